/*
 * One key: a record in the store, the owners who come for it, an operator, somebody who cancels, a reader who follows an
 * answer while it comes, somebody who asks, the API behind and who settles by what it says, and time. Each `::` is one atomic step (one
 * script, one write); between two of them anything may happen. The same rules as in rules.py and key.py, written
 * once more for spin: both must come to the same verdicts and, where nothing breaks, to the same number of states.
 *
 *   spin -a key.pml && cc -DSAFETY -o pan pan.c && ./pan                  the rules hold
 *   spin -a -DWITHOUT=NOT_AFTER -DLOST_CLAIMS=1 key.pml && ...            one safeguard less: a promise breaks
 *
 * Who takes part: -DOWNERS=n, -DRETRIERS=b (bit i: owner i claims under `retry`), -DOPERATORS, -DSTREAMS, -DLOST_CLAIMS,
 * -DLATE_SETTLES, -DHANGS, -DCANCELS, -DJOINS, -DASKS, -DLANDS_LATE, -DAPI, -DFORGETS, -DRECONCILES (0 or 1);
 * -DRESENDERS=b (bit i: the API of owner i recognizes keys). -DONLY=P_TWICE looks at one promise alone. With -DCHOSEN_LATER all of them come from
 * the environment of ./pan, in numbers: one verifier for every variant.
 */
#ifndef OWNERS
#define OWNERS 2
#endif
#ifndef RETRIERS
#define RETRIERS 0
#endif
#ifndef OPERATORS
#define OPERATORS 0
#endif
#ifndef STREAMS
#define STREAMS 0
#endif
#ifndef LOST_CLAIMS
#define LOST_CLAIMS 0
#endif
#ifndef LATE_SETTLES
#define LATE_SETTLES 0
#endif
#ifndef HANGS
#define HANGS 0
#endif
#ifndef CANCELS
#define CANCELS 0
#endif
#ifndef JOINS
#define JOINS 0
#endif
#ifndef ASKS
#define ASKS 0
#endif
#ifndef LANDS_LATE
#define LANDS_LATE 0
#endif
#ifndef RESENDERS
#define RESENDERS 0
#endif
#ifndef API
#define API 0
#endif
#ifndef FORGETS
#define FORGETS 0
#endif
#ifndef RECONCILES
#define RECONCILES 0
#endif
#ifndef WITHOUT
#define WITHOUT 0
#endif
#ifndef AND_WITHOUT
#define AND_WITHOUT 0
#endif
#ifndef ONLY
#define ONLY 0
#endif

/* The safeguards; variants.py says what each is. */
#define ATOMIC 1
#define KNOWN_AGAIN 2
#define NOT_AFTER 3
#define UNKNOWN_STAYS 4
#define LAPSED_IS_UNKNOWN 5
#define RECORDS_OWN_MODE 6
#define AS_OF_NOW 7
#define AS_SEEN 8
#define TOKEN_ON_APPEND 9
#define TOKEN_ON_RENEW 10
#define TOKEN_ON_STORE 11
#define TOKEN_ON_RELEASE 12
#define TOKEN_ON_UNKNOWN 13
#define COUNTED 14
#define FINAL 15
#define OPERATOR_COMPARES 16
#define OPERATOR_FENCES 17
#define LEASE 18
#define WITHHELD 19
#define FENCED_IS_SILENT 20
#define CLAIMED_AGAIN 21
#define LOST_IS_UNKNOWN 22
#define WITHDRAWN_AT_ALL 23
#define WITHDRAWN_LATE 24
#define COPIES_WITHDRAWN 25
#define RENEWED_ALIVE 26
#define CANCELLED_STAYS 27
#define ENDED_FIRST 28
#define NOTE_NAMES_CLAIM 29
#define OWNER_ENDS_IT 30
#define UNSENT_STAYS 31
#define FOLLOW_NAMES_CLAIM 32
#define STORED_FIRST 33
#define RESEND_OF_SAME 34
#define RESEND_IN_TIME 35
#define RESEND_KEEPS 36
#define RESEND_STAYS 37
#define VERDICT_COMPARES 38
#define VERDICT_SPARES 39
#define VERDICT_AS_SEEN 40
#define VERDICT_LEAVES_STOPPED 41
#define ABSENT_WAITS 42
#define ABSENT_IN_TIME 43
#define ABSENT_AGREES 44
#define OWN_REFERENCE 45
#define HAS(safeguard) (without != safeguard && and_without != safeguard)

/* The promises; world.py says what each means. */
#define P_TWICE 1
#define P_DIFFER 2
#define P_UNBACKED 3
#define P_ZOMBIE 4
#define P_FINAL 5
#define P_ROBBED 6
#define P_UNCHECKED 7
#define P_LAPSED_SEND 8
#define P_ITSELF 9
#define P_TORN 10
#define P_STRAY 11
#define P_STUCK 12
#define P_ASTRAY 13
#define P_TAKEN_BACK 14
#define P_MIXED 15
#define P_DENIED 16
#define P_OVERRULED 17
#define P_FREED_EARLY 18
#define P_MADE_UP 19
#define KEEPS(promise, fact) assert((only != 0 && only != promise) || (fact))

/* An owner's way. */
#define MOST 3
#define ABOUT_TO_COME 0
#define CLAIMING 1
#define REPEATING 2
#define FOUND_FREE 3
#define GIVEN_UP 4
#define WITHDRAWING 5
#define CLAIMED 6 /* from here ... */
#define STALE 7
#define SENT 8
#define STREAMING 9
#define STREAMED 10
#define STORE 11 /* (the settles) */
#define STREAM 12
#define BARE 13
#define RELEASE 14
#define UNKNOWN 15
#define CANCELLED 16 /* ... to here its leases are renewed */
#define HUNG 17
#define WITHDRAWN 18
#define TOLD 19
#define ENDED 20
#define DEAD 21
#define at place[me]
#define IS_ACTIVE(who) (place[who] >= CLAIMED && place[who] <= CANCELLED)
#define IS_SETTLING (at >= STORE && at <= CANCELLED)
#define HAS_LEFT(who) (place[who] == TOLD || place[who] == WITHDRAWN)
#define RETRIES(who) ((retriers >> who) & 1)
#define RESENDS(who) ((resenders >> who) & 1)
#define OPERATOR 9

mtype = { absent, in_flight, unknown, complete, released };         /* states of the record */
mtype = { whole, bare, torn };                                      /* what it has of an answer */
mtype = { claimed, found, late, told, appended, renewed, stored, freed_, marked, fenced, done, none, resolved };

/* What was chosen. */
byte owners = OWNERS, retriers = RETRIERS, resenders = RESENDERS, without = WITHOUT, and_without = AND_WITHOUT, only = ONLY;
bool operators = OPERATORS, streams = STREAMS, lost_claims = LOST_CLAIMS, late_settles = LATE_SETTLES, hangs = HANGS,
	cancels = CANCELS, joins = JOINS, asks = ASKS, lands_late = LANDS_LATE, api = API, forgets = FORGETS, reconciles = RECONCILES;
/* The record. */
mtype state = absent;
byte token, piece, answer;
bool retry, lease;
bool cancelled;             /* its mode is `cancelled`, whatever that of its claim was */
mtype body;
/* The owners, from 1. */
byte place[MOST + 1], seen[MOST + 1];
byte claim_copy[MOST + 1];  /* a claim on its way: what it had seen, plus one */
byte settle_copy[MOST + 1]; /* a settle on its way */
bool counts[MOST + 1];      /* executed under hold or cancelled, not declined, not released by an operator */
bool freed[MOST + 1];       /* an operator ended its claim */
bool resent[MOST + 1];      /* took a key over to send its request once more */
bool coming[MOST + 1];      /* its request is on its way to the API, or the API does not show it yet */
/* The API: it shows an execution; nothing can come any more; nobody relies on it; it knows nothing; it was wrong once. */
bool executed, waited, old, forgotten, glitched;
/* Who asks it: the token that was looked at, absent was said once, 1 answer or 2 release, its owner was back since. */
byte probed, verdict;
bool agreed, stale;
byte saw;                   /* the operator: the token that was seen */
byte truth;                 /* whose answer was delivered first */
byte note;                  /* the token that a cancel names; it stays, because a note may come late and twice */
byte stopped;               /* of whose claim somebody was told that it was stopped */
byte follower;              /* the token whose answer a reader follows; OPERATOR: has its end, or was broken off */
mtype word;                 /* the reply to the last verb; 0 between two steps */

#define FREE (state == absent || state == released)
#define OVER (state == unknown || (state == in_flight && !lease))
#define OPEN(who) ((!HAS(UNKNOWN_STAYS) && state == unknown) || (!HAS(LAPSED_IS_UNKNOWN) && state == in_flight && !lease) \
	|| (OVER && (HAS(RECORDS_OWN_MODE) -> retry : RETRIES(who))))
#define OURS(who) (HAS(KNOWN_AGAIN) && state == in_flight && token == who)
#define TAKES_ON(who) (resent[who] && OVER && !retry && !cancelled)
#define MAY_TAKE(who, what) (what != 0 && (OPEN(who) || TAKES_ON(who) || (!HAS(AS_OF_NOW) && state == in_flight)) \
	&& (token == what || !HAS(AS_SEEN)))

/* The store's verbs ... */

inline become(a_state, a_token, a_mode, a_lease, an_answer, a_body) {
	state = a_state; token = a_token; retry = a_mode; lease = a_lease; piece = 0; answer = an_answer; body = a_body;
	cancelled = false
}
inline claim(what, is_late, split) {
	if
	:: !FREE && !OURS(me) && (!MAY_TAKE(me, what) || (is_late && HAS(NOT_AFTER))) -> word = told
	:: else ->
		if
		:: (is_late && HAS(NOT_AFTER)) || (resent[me] && what != 0 && FREE) -> word = late
		:: else ->
			if
			:: !FREE && token != me ->
				if
				:: state == complete -> KEEPS(P_FINAL, false)
				:: state != complete && lease -> KEEPS(P_ROBBED, false)
				:: state != complete && !lease -> KEEPS(P_UNCHECKED, token == what)
				fi
			:: else
			fi;
			if
			:: split && token != me -> word = found
			:: else ->
				word = claimed;
				if
				:: OURS(me) -> lease = true
				:: else -> become(in_flight, me, RETRIES(me), true, 0, 0)
				fi
			fi
		fi
	fi
}
inline changes() { /* a write of this owner is about to change the record */
	if
	:: state == complete -> KEEPS(P_FINAL, false)
	:: else -> KEEPS(P_ZOMBIE, (token == 0 || token == me) && state != released)
	fi
}
inline append() {
	if
	:: state == complete -> word = (token == me -> done : fenced)
	:: state == absent -> word = none
	:: state != complete && state != absent && token != me && HAS(TOKEN_ON_APPEND) -> word = fenced
	:: state != complete && state != absent && (token == me || !HAS(TOKEN_ON_APPEND)) ->
		if
		:: piece != 0 && piece != me -> word = torn
		:: else ->
			word = appended;
			if
			:: piece != me -> changes()
			:: else
			fi;
			piece = me
		fi
	fi
}
inline renew() {
	if
	:: state == in_flight && (token == me || !HAS(TOKEN_ON_RENEW)) ->
		word = renewed;
		if
		:: !lease -> changes(); lease = true
		:: else
		fi
	:: else /* whatever it is told, it does nothing about it */
	fi
}
#define GUARDED(how) ((how == RELEASE && HAS(TOKEN_ON_RELEASE)) || (how >= UNKNOWN && HAS(TOKEN_ON_UNKNOWN)) \
	|| (how <= BARE && HAS(TOKEN_ON_STORE)))
#define STAYS(how) (how == CANCELLED && HAS(CANCELLED_STAYS))
#define IS_MARKED(how) (state == unknown && token == me && retry == (RETRIES(me) && !STAYS(how)) \
	&& cancelled == STAYS(how) && piece == 0)
#define LACKS(how) (how == STREAM && piece == 0)
inline settle(how) {
	if
	:: state != absent && token != me && GUARDED(how) -> word = fenced
	:: else ->
		if
		:: state == complete && HAS(FINAL) -> word = (how <= BARE && answer == me -> stored : done)
		:: (state != complete || !HAS(FINAL)) && how == RELEASE ->
			word = freed_;
			if
			:: state != absent -> changes()
			:: else
			fi;
			become(absent, 0, 0, false, 0, 0)
		:: (state != complete || !HAS(FINAL)) && how >= UNKNOWN ->
			word = marked;
			stale = (state == in_flight && probed == me -> true : stale);
			if
			:: !IS_MARKED(how) -> changes()
			:: else
			fi;
			become(unknown, me, (RETRIES(me) && !STAYS(how)), false, 0, 0);
			cancelled = STAYS(how);
			counts[me] = (counts[me] || how == CANCELLED)
		:: (state != complete || !HAS(FINAL)) && how <= BARE && LACKS(how) && HAS(COUNTED) -> word = torn
		:: (state != complete || !HAS(FINAL)) && how <= BARE && !(LACKS(how) && HAS(COUNTED)) ->
			word = stored;
			if
			:: state != complete && LACKS(how) -> KEEPS(P_TORN, false)
			:: state != complete && !LACKS(how) -> changes()
			:: state == complete -> KEEPS(P_FINAL, token == me && body == (how == BARE -> bare : (LACKS(how) -> torn : whole)))
			fi;
			body = (how == BARE -> bare : (LACKS(how) -> torn : whole));
			state = complete; token = me; retry = 0; cancelled = false; lease = false; piece = 0; answer = me
		fi
	fi
}
inline resolve(a_state, an_answer, a_body) {
	if
	:: FREE -> word = none
	:: state == complete && HAS(OPERATOR_COMPARES) -> word = done
	:: !FREE && state != complete && token != saw && HAS(OPERATOR_COMPARES) -> word = fenced
	:: !FREE && (!HAS(OPERATOR_COMPARES) || (state != complete && token == saw)) ->
		word = resolved;
		KEEPS(P_FINAL, state != complete || (a_state == complete && answer == an_answer && HAS(OPERATOR_FENCES)));
		become(a_state, (HAS(OPERATOR_FENCES) -> OPERATOR : token), 0, false, an_answer, a_body)
	fi
}

/* ... and what is done with their replies. */

inline deliver(whose, own) {
	KEEPS(P_DIFFER, truth == 0 || truth == whose);
	if
	:: truth == 0 || truth == whose ->
		KEEPS(P_TAKEN_BACK, stopped != whose);
		if
		:: stopped != whose ->
			KEEPS(P_UNBACKED, !own || (state == complete && answer == whose));
			truth = whose
		:: else
		fi
	:: else
	fi
}
inline deliver_the_record(otherwise) {
	if
	:: state == complete && body == whole -> at = (otherwise == TOLD -> ENDED : otherwise); deliver(answer, false)
	:: else ->
		stopped = (state == unknown && cancelled -> token : stopped);
		at = otherwise
	fi
}
inline has_all(how) {
	at = how;
	if
	:: !HAS(WITHHELD) -> deliver(me, true)
	:: else
	fi
}
#define IS_GIVEN_UP ((state == in_flight || state == unknown) && (place[token] == GIVEN_UP || place[token] == WITHDRAWING))
#define GAVE_UP (resent[me] && HAS(RESEND_STAYS) -> ENDED : GIVEN_UP)
#define LOSES (at == CLAIMING -> REPEATING : GAVE_UP)
#define IS_TOLD (resent[me] -> ENDED : TOLD)
#define FREES (resent[me] && HAS(RESEND_KEEPS) -> UNKNOWN : RELEASE)
#define TOO_OLD (resent[me] && old && HAS(RESEND_IN_TIME))
#define MAY_RESEND (!resent[me] && RESENDS(me) && OVER && !retry && !cancelled \
	&& (RESENDS(token) || !HAS(RESEND_OF_SAME)) && (!old || !HAS(RESEND_IN_TIME)))
#define MAY_STAND ((at == REPEATING || claim_copy[me] != 0) && HAS(COPIES_WITHDRAWN))
#define MAY_LAND (at == WITHDRAWING && lands_late && claim_copy[me] != 0 && HAS(ENDED_FIRST))
#define CAN_SEND (at == CLAIMED || (at == STALE && !HAS(CLAIMED_AGAIN)))
#define CAN_CANCEL (cancels && (CAN_SEND || at == SENT || at == STREAMING || at == STREAMED))
#define IS_ANOTHER(who) (me != who && counts[who] && !(RESENDS(me) && RESENDS(who) && !forgotten))
#define OTHERS_COUNT (IS_ANOTHER(1) || IS_ANOTHER(2) || IS_ANOTHER(3))

proctype owner(byte me) {
end:
	do
	/* Claiming. Equal owners come in their order: which of them is the first makes no difference. */
	:: atomic { at == ABOUT_TO_COME && (me == 1 || place[me - 1] != ABOUT_TO_COME) -> at = CLAIMING }
	:: atomic { at == CLAIMING || at == REPEATING ->
		claim(seen[me], false, !HAS(ATOMIC));
		if
		:: word == claimed -> at = CLAIMED; freed[me] = false
		:: word == claimed && lost_claims -> at = LOSES
		:: word == found -> at = FOUND_FREE
		:: word == told || word == late ->
			KEEPS(P_ITSELF, state != in_flight || token != me);
			if
			:: IS_GIVEN_UP && token != me && token != seen[me] -> /* known at the same worker */
				at = CLAIMING; seen[me] = token;
				become(absent, 0, 0, false, 0, 0)
			:: OPEN(me) && token != seen[me] -> at = CLAIMING; seen[me] = token
			:: !(OPEN(me) && token != seen[me]) && MAY_RESEND -> at = CLAIMING; seen[me] = token; resent[me] = true
			:: !(OPEN(me) && token != seen[me]) && !MAY_RESEND && MAY_STAND -> deliver_the_record(GAVE_UP)
			:: !(OPEN(me) && token != seen[me]) && !MAY_RESEND && !MAY_STAND -> deliver_the_record(IS_TOLD)
			fi
		fi;
		word = 0 }
	:: atomic { (at == CLAIMING || at == REPEATING) && lost_claims && claim_copy[me] == 0 ->
		claim_copy[me] = seen[me] + 1; at = LOSES }
	:: atomic { at == FOUND_FREE -> become(in_flight, me, RETRIES(me), true, 0, 0); at = CLAIMED }
	:: atomic { at == GIVEN_UP -> at = (HAS(WITHDRAWN_AT_ALL) -> WITHDRAWING : WITHDRAWN) }
	:: atomic { MAY_LAND && token == me && (state == in_flight || state == unknown) -> settle(RELEASE); word = 0 }
	:: atomic { MAY_LAND -> claim_copy[me] = 0 } /* the server ends it */
	:: atomic { (at == WITHDRAWING && !MAY_LAND) || (at == GIVEN_UP && HAS(WITHDRAWN_AT_ALL) && !HAS(WITHDRAWN_LATE)) ->
		settle(RELEASE); word = 0;
		at = (at == WITHDRAWING -> WITHDRAWN : TOLD) }
	:: atomic { at == STALE && HAS(CLAIMED_AGAIN) && TOO_OLD -> at = FREES }
	:: atomic { at == STALE && HAS(CLAIMED_AGAIN) && !TOO_OLD ->
		claim(0, false, false);
		if
		:: word == claimed -> at = CLAIMED; freed[me] = false
		:: word != claimed -> KEEPS(P_ITSELF, state != in_flight || token != me); at = FREES
		:: lost_claims -> at = FREES
		fi;
		word = 0 }
	:: atomic { at == STALE && HAS(CLAIMED_AGAIN) && !TOO_OLD && lost_claims && claim_copy[me] == 0 ->
		claim_copy[me] = 1; at = FREES }
	/* The exchange. */
	:: atomic { CAN_SEND ->
		KEEPS(P_TWICE, freed[me] || !OTHERS_COUNT);
		KEEPS(P_LAPSED_SEND, freed[me] || token == me);
		counts[me] = (!RETRIES(me) && !freed[me]);
		coming[me] = api; waited = false;
		at = SENT }
	:: atomic { CAN_SEND -> at = FREES } /* reaches nobody */
	:: atomic { at == SENT -> at = (HAS(LOST_IS_UNKNOWN) -> UNKNOWN : RELEASE) }
	:: atomic { at == SENT && (coming[me] || !api) -> at = FREES; counts[me] = false; coming[me] = false } /* declined */
	:: atomic { at == SENT && (!api || (executed && !coming[me])) -> has_all(STORE) }
	:: atomic { at == SENT && streams -> has_all(BARE) } /* too large */
	:: atomic { at == SENT && streams -> at = STREAMING }
	:: atomic { CAN_CANCEL && HAS(UNSENT_STAYS) -> at = CANCELLED }
	:: atomic { CAN_CANCEL && !HAS(UNSENT_STAYS) && !CAN_SEND -> at = CANCELLED }
	:: atomic { CAN_SEND && !HAS(UNSENT_STAYS) -> at = RELEASE; counts[me] = true }
	:: atomic { CAN_CANCEL && !HAS(NOTE_NAMES_CLAIM) && note != 0 && note != me -> KEEPS(P_ASTRAY, false); at = CANCELLED }
	:: atomic { at == STREAMING ->
		append();
		if
		:: word == appended -> at = STREAMED
		:: word == none || word == torn -> at = BARE
		:: word != appended && word != none && word != torn -> at = UNKNOWN
		:: true /* the reply is lost */
		fi;
		word = 0 }
	:: atomic { at == STREAMED -> at = UNKNOWN } /* breaks off */
	:: atomic { at == STREAMED -> has_all(STREAM) }
	/* Settling. */
	:: atomic { IS_SETTLING ->
		settle(at);
		if
		:: word == torn -> at = BARE
		:: word != torn && at <= BARE && (word == stored || !HAS(FENCED_IS_SILENT)) -> at = ENDED; deliver(me, true)
		:: word != torn && !(at <= BARE && (word == stored || !HAS(FENCED_IS_SILENT))) ->
			if
			:: (word == fenced || word == done) && at != STREAM -> deliver_the_record(ENDED)
			:: else -> at = (at == RELEASE && claim_copy[me] != 0 && HAS(COPIES_WITHDRAWN) -> GIVEN_UP : ENDED)
			fi
		:: true /* the reply is lost */
		fi;
		word = 0 }
	:: atomic { IS_SETTLING && late_settles && settle_copy[me] == 0 -> settle_copy[me] = at }
	:: atomic { IS_SETTLING && at <= BARE -> at = UNKNOWN } /* interrupted */
	/* What happens to it. */
	:: atomic { IS_ACTIVE(me) || at == GIVEN_UP || at == WITHDRAWING -> at = DEAD }
	:: atomic { hangs && (at == CLAIMED || at == SENT) -> at = HUNG }
	:: atomic { IS_ACTIVE(me) ->
		renew();
		at = (word == renewed && at == STALE -> CLAIMED : at);
		word = 0 }
	:: atomic { claim_copy[me] != 0 ->
		claim((claim_copy[me] - 1), ((at == WITHDRAWING || at == WITHDRAWN) && !lands_late), false);
		claim_copy[me] = 0; word = 0 }
	:: atomic { settle_copy[me] != 0 -> settle(settle_copy[me]); settle_copy[me] = 0; word = 0 }
	/* Its request on the way to the API: it arrives, or gets lost. */
	:: atomic { coming[me] -> coming[me] = false; executed = true }
	:: atomic { coming[me] -> coming[me] = false; counts[me] = false }
	od
}

proctype operator() {
end:
	do
	:: atomic { operators && saw == 0 && (state == in_flight || state == unknown) -> saw = token }
	:: atomic { saw != 0 && saw != OPERATOR ->
		if
		:: resolve(complete, OPERATOR, whole)
		:: resolve(released, 0, 0)
		fi;
		if
		:: word == resolved -> counts[saw] = false; freed[saw] = true
		:: else
		fi;
		saw = OPERATOR; word = 0 }
	od
}

/* Who stops it, who reads it while it comes, and who asks. */
#define FOLLOWS (follower != 0 && follower != OPERATOR)
#define OTHERS_BYTES ((piece != 0 && piece != follower) || (answer != 0 && answer != follower))
#define BLIND (!HAS(FOLLOW_NAMES_CLAIM) && (state == in_flight || state == complete) && OTHERS_BYTES)
#define HAS_END (token == follower && state == complete && body == whole)

proctype others() {
end:
	do
	:: atomic { cancels && note == 0 && state == in_flight && lease ->
		note = token;
		if
		:: !HAS(OWNER_ENDS_IT) ->
			become(unknown, token, (retry && HAS(CANCELLED_STAYS) == 0), false, 0, 0);
			cancelled = HAS(CANCELLED_STAYS)
		:: else
		fi }
	:: atomic { joins && follower == 0 && state == in_flight && lease && piece == token -> follower = token }
	:: atomic { FOLLOWS && !HAS(STORED_FIRST) && place[follower] == STREAM -> deliver(follower, true); follower = OPERATOR }
	:: atomic { FOLLOWS && BLIND -> KEEPS(P_MIXED, false); follower = OPERATOR }
	:: atomic { FOLLOWS && !BLIND && HAS_END -> deliver(answer, false); follower = OPERATOR }
	:: atomic { FOLLOWS && !BLIND && !HAS_END && (FREE || token != follower || state == complete || OVER) ->
		follower = OPERATOR } /* broken off */
	:: atomic { asks && state == absent -> KEEPS(P_DENIED, !(counts[1] || counts[2] || counts[3])) }
	od
}

/* What the API knows, and who asks it. */
#define COMES (coming[1] || coming[2] || coming[3])
#define IS_UNSENT(who) (resent[who] && (place[who] == CLAIMING || place[who] == REPEATING || place[who] == CLAIMED \
	|| place[who] == STALE))
#define SHOWN (executed && !forgotten)
#define IS_ASKED (reconciles && verdict == 0 && OVER && (!cancelled || !HAS(VERDICT_LEAVES_STOPPED)))
#define IT_COUNTS ((waited || !HAS(ABSENT_WAITS)) && (!old || !HAS(ABSENT_IN_TIME)))
#define IS_SAME (token == probed && !lease && !cancelled)
#define IS_REFUSED (FREE || state == complete || (token != probed && HAS(VERDICT_COMPARES)) \
	|| (lease && HAS(VERDICT_SPARES)) || (stale && token == probed && HAS(VERDICT_AS_SEEN)))

proctype behind() {
end:
	do
	:: atomic { api && reconciles && !COMES && !waited && OVER -> waited = true }
	:: atomic { forgets && !old -> old = true }
	:: atomic { forgets && old && !forgotten && !IS_UNSENT(1) && !IS_UNSENT(2) && !IS_UNSENT(3) -> forgotten = true }
	:: atomic { IS_ASKED && (SHOWN || !HAS(OWN_REFERENCE)) ->
		probed = token; agreed = false; stale = false; verdict = 1 }
	:: atomic { IS_ASKED && IT_COUNTS && !(SHOWN && (glitched || !forgets)) ->
		if
		:: (probed == token && agreed && !stale) || !HAS(ABSENT_AGREES) -> verdict = 2; agreed = false
		:: else -> agreed = true
		fi;
		probed = token; stale = false; glitched = (glitched || SHOWN) }
	:: atomic { verdict != 0 ->
		if
		:: IS_REFUSED
		:: else ->
			KEEPS(P_OVERRULED, IS_SAME);
			KEEPS(P_FREED_EARLY, !IS_SAME || verdict == 1 || !(executed || COMES));
			KEEPS(P_MADE_UP, !IS_SAME || verdict == 2 || executed);
			if
			:: verdict == 1 -> become(complete, OPERATOR, 0, false, OPERATOR, whole)
			:: else -> become(released, OPERATOR, 0, false, 0, 0)
			fi
		fi;
		probed = 0; agreed = false; stale = false; verdict = 0 }
	od
}

/* Time brings every step of an owner but those that are chance; after the last one the key must be out of flight. */
#define IS_RENEWED(who) (IS_ACTIVE(who) || (place[who] == HUNG && !HAS(RENEWED_ALIVE)))
#define RESTS(who) (place[who] == ABOUT_TO_COME || place[who] >= HUNG)
#define ALL_REST (RESTS(1) && RESTS(2) && RESTS(3))

proctype time() {
end:
	do
	:: atomic { lease && HAS(LEASE) ->
		lease = false;
		stale = (probed == token -> true : stale);
		place[token] = (place[token] == CLAIMED -> STALE : place[token]) }
	:: atomic { ALL_REST && !(lease && HAS(LEASE) && !IS_RENEWED(token)) ->
		KEEPS(P_STUCK, !lease);
		KEEPS(P_STRAY, !((state == in_flight || state == unknown) && HAS_LEFT(token))) }
	od
}

#ifdef CHOSEN_LATER
c_decl {
	static int chosen(char *name) { char *said = getenv(name); return said ? atoi(said) : 0; }
}
#endif

init {
	atomic {
#ifdef CHOSEN_LATER
		c_code {
			now.owners = chosen("OWNERS"); now.retriers = chosen("RETRIERS"); now.operators = chosen("OPERATORS");
			now.streams = chosen("STREAMS"); now.lost_claims = chosen("LOST_CLAIMS");
			now.late_settles = chosen("LATE_SETTLES"); now.hangs = chosen("HANGS"); now.cancels = chosen("CANCELS");
			now.lands_late = chosen("LANDS_LATE"); now.joins = chosen("JOINS"); now.asks = chosen("ASKS");
			now.resenders = chosen("RESENDERS"); now.api = chosen("API"); now.forgets = chosen("FORGETS");
			now.reconciles = chosen("RECONCILES");
			now.without = chosen("WITHOUT"); now.and_without = chosen("AND_WITHOUT"); now.only = chosen("ONLY");
		};
#endif
		run owner(1);
		run owner(2);
		if
		:: owners > 2 -> run owner(3)
		:: else
		fi;
		run operator();
		run others();
		run behind();
		run time()
	}
}
