"""The clients of the table: how each is run, and the rule that its user would write."""

from dataclasses import dataclass, replace

LLM = "LLM SDKs"
PAYMENTS = "SDKs that make keys, and command lines"
WORKERS = "Workers of queues"
BROWSERS = "Browsers"
NO_KEY, MARKED, OWN_KEYS, CALLERS_KEY = "no key", "marked retries", "keys of its own", "a caller's key"


@dataclass(frozen=True, slots=True)
class Client:
    """One row. `program` is a file in `programs/` with its arguments; `preset` is that of the rule.

    `sends`: what tells a retry from a new request. `streams`: it asks for a stream.
    """

    name: str
    language: str
    group: str
    program: tuple[str, ...]
    preset: str
    sends: str = NO_KEY
    streams: bool = True

    @property
    def key(self) -> bool:
        """Whether the caller gives a key, and so can call again after an error."""
        return self.sends == CALLERS_KEY

    @property
    def label(self) -> str:
        """What names the row."""
        return f"{self.name} ({self.language})"


def _with_and_without_key(*clients: Client) -> list[Client]:
    return [one for client in clients for one in (client, replace(client, sends=CALLERS_KEY))]


CLIENTS = [
    *_with_and_without_key(
        Client("openai", "Python", LLM, ("with_openai.py",), "openai", MARKED),
        Client("openai", "npm", LLM, ("with_openai.mjs",), "openai", MARKED),
        Client("anthropic", "Python", LLM, ("with_anthropic.py",), "anthropic", MARKED),
        Client("@anthropic-ai/sdk", "npm", LLM, ("with_anthropic.mjs",), "anthropic", MARKED),
        Client("groq", "Python", LLM, ("with_groq.py",), "openai", MARKED),
        Client("litellm", "Python", LLM, ("with_litellm.py",), "openai", MARKED),
        Client("mistralai", "Python", LLM, ("with_mistral.py",), "openai"),
        Client("cohere", "Python", LLM, ("with_cohere.py",), "openai"),
        Client("google-genai", "Python", LLM, ("with_genai.py",), "gemini"),
        Client("ai", "npm", LLM, ("with_ai.mjs",), "openai"),
    ),
    *_with_and_without_key(
        Client("stripe", "Python", PAYMENTS, ("with_stripe.py",), "payments", OWN_KEYS, streams=False),
        Client("stripe", "npm", PAYMENTS, ("with_stripe.mjs",), "payments", OWN_KEYS, streams=False),
        Client("svix", "Python", PAYMENTS, ("with_svix.py",), "payments", OWN_KEYS, streams=False),
        Client("svix", "npm", PAYMENTS, ("with_svix.mjs",), "payments", OWN_KEYS, streams=False),
    ),
    Client("curl", "Debian", PAYMENTS, ("with_curl.py", "curl"), "payments", sends=CALLERS_KEY, streams=False),
    Client("wget", "Debian", PAYMENTS, ("with_curl.py", "wget"), "payments", sends=CALLERS_KEY, streams=False),
    Client("Chromium", "Debian", BROWSERS, ("chromium",), "payments", CALLERS_KEY, streams=False),
    Client("Firefox ESR", "Debian", BROWSERS, ("firefox",), "payments", CALLERS_KEY, streams=False),
    # The key is the id of the task: the caller cannot call again under it.
    Client("celery", "Python", WORKERS, ("with_celery.py",), "payments", "the id of its task", streams=False),
    Client("dramatiq", "Python", WORKERS, ("with_dramatiq.py",), "payments", "the id of its task", streams=False),
    Client("rq", "Python", WORKERS, ("with_rq.py",), "payments", "the id of its task", streams=False),
]
