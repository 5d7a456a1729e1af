"""The header fields and Authorization schemes that are known to say whose request it is.

They are part of a key's name: whoever changes a table raises `oncegate.keys.digests.NAMING`.
"""

import re
from collections.abc import Iterable

from oncegate.settings.names import parse_scope_header

# A member of a scope that stands for all of CREDENTIALS and ACCOUNTS.
KNOWN = "known"
# An entry of stable schemes that stands for a credential without a scheme, such as `Authorization: sk_live_1`.
BARE = "bare"

# Field -> who sends it. A field with a credential in it: each value is another client.
CREDENTIALS = {
    "Authorization": "all of HTTP",
    "X-Api-Key": "Anthropic, AWS API Gateway and many others",
    "Api-Key": "Azure OpenAI, New Relic, Pinecone",
    # Beside the one above, because it would pass for an imitation of it, and be refused.
    "Api_Key": "APIs with this spelling",
    "ApiKey": "Kong, Supabase",
    "X-Goog-Api-Key": "Google, such as Gemini",
    "Ocp-Apim-Subscription-Key": "Azure API Management",
    "X-Auth-Token": "OpenStack and others",
    "X-Auth-Key": "Cloudflare",
    "X-Access-Token": "various",
    "X-Session-Token": "various",
    "Private-Token": "GitLab",
    "Job-Token": "GitLab",
    "Deploy-Token": "GitLab",
    "X-Shopify-Access-Token": "Shopify",
    "X-Amz-Security-Token": "AWS, temporary credentials",
    "X-Amz-Access-Token": "Amazon Selling Partner API",
    "X-Vault-Token": "Vault",
    "X-Postmark-Server-Token": "Postmark",
    "X-Subscription-Token": "Brave",
    "X-RapidAPI-Key": "RapidAPI",
    "Xi-Api-Key": "ElevenLabs",
    "DD-Api-Key": "Datadog",
    "Circle-Token": "CircleCI",
}
# Field -> who sends it. A field that chooses the account for which a credential acts, or that names a user for whom
# somebody else has vouched. It proves nothing by itself.
ACCOUNTS = {
    "Stripe-Account": "Stripe Connect",
    "Stripe-Context": "Stripe organizations",
    "OpenAI-Organization": "OpenAI",
    "OpenAI-Project": "OpenAI",
    "X-Goog-User-Project": "Google",
    "PayPal-Auth-Assertion": "PayPal, for a merchant",
    "Xero-Tenant-Id": "Xero",
    "X-On-Behalf-Of": "Airwallex",
    "X-Vault-Namespace": "Vault",
    "X-Auth-Email": "Cloudflare",
    "X-Account": "various",
    "X-Account-Id": "various",
    "X-Tenant": "various",
    "X-Tenant-Id": "various",
    "X-Org": "various",
    "X-Org-Id": "various",
    "X-Organization": "various",
    "X-Organization-Id": "various",
    "X-Project-Id": "various",
    "X-Workspace-Id": "various",
    "X-Merchant-Id": "various",
    "X-Customer-Id": "various",
    "X-User-Id": "various",
    "X-Forwarded-User": "OAuth2 Proxy",
    "X-Auth-Request-User": "OAuth2 Proxy",
    "X-Consumer-Id": "Kong",
    "X-Amzn-Oidc-Identity": "AWS load balancers",
    "X-Goog-Authenticated-User-Id": "Google's identity-aware proxy",
    "X-Ms-Client-Principal-Id": "Azure App Service",
    "Cf-Access-Authenticated-User-Email": "Cloudflare Access",
}
# Authorization schemes whose credential stays the same from try to try. Those of most others are made anew for each
# request, as in Digest or AWS4: a retry would be another tenant's and never find its original.
STABLE_SCHEMES = ("Basic", "Bearer", "Token", "ApiKey")


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names with those that `known` stands for in its place, each name once."""
    each = ((*CREDENTIALS, *ACCOUNTS) if name == KNOWN else (name,) for name in names)
    return tuple(dict.fromkeys(name for members in each for name in members))


def parse_scope(text: str) -> str:
    """Return a member of the scope headers: `known`, or the name of a field that can identify a tenant."""
    return KNOWN if text.lower() == KNOWN else parse_scope_header(text)


def parse_scheme(text: str) -> str:
    """Return the name of an Authorization scheme, or `bare`, in lower case."""
    # RFC 9110, section 11.1: a token.
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", text):
        raise ValueError("must name schemes of Authorization, such as DPoP, or bare")
    return text.lower()
