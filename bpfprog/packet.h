/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The contract between packet.bpf.c and user space; the same three readers as abi.h.
 *
 * A flow is one connection whose packets are translated.  Its number is its place in `flows`, which
 * user space maps into memory; `ends` leads from a packet's addresses to it.
 */

enum {
	/* what the maps are pinned under: one more for each change of what is in them */
	PACKET_ABI = 2,
	/* Bytes that a client may have sent before the hand-off, and the backend not acknowledged:
	 * so few that what is under way, ten segments or the twenty after them, fits its first
	 * window.
	 */
	MAX_HEAD = 16384,
	/* flows at once; what it takes of memory, 23 MB, is taken at once */
	MAX_FLOWS = 65536,
	MAX_ENDS = 131072,
	/* handshakes that are remembered until they are answered, and then until the hand-over */
	MAX_SEEN = 16384,
	/* routers and workers of one instance at once, each with a ring of its own */
	MAX_OWNERS = 32,
	FLOW_EVENTS_BYTES = 262144,
	NOTE_BYTES = 512,
};

/* Addresses and ports of a packet as it arrives; an IPv4 address is an IPv4-mapped one. */
struct tuple {
	__be32 from[4], to[4];
	__be16 from_port, to_port;
};

/* A SYN or SYN-ACK of this host's own, and what has answered it with its addresses, turned round.
 */
struct passage {
	__u32 answer; /* what that acknowledges: the next sequence number */
	__u32 device; /* by which it came; 0: it has not */
};

/* in the place of a device: it came by two */
enum { SEVERAL = 0xffffffff };

enum { CLIENT_END, BACKEND_END };

/* A state is left by compare-and-swap, so whoever leaves it does what comes with that, once.
 *
 * A router of another version counts the flows under way, to take down what is pinned after the
 * last: under every PACKET_ABI the map is `flows`, an array that can be mapped into memory, the
 * state is the first word of its values, and FLOW_HELLO and FLOW_OPEN, and no others, are those of
 * flows under way, with these numbers.
 */
enum flow_state {
	FLOW_FREE,
	FLOW_CLAIMED, /* somebody's, not in `ends` yet */
	FLOW_HELLO, /* translated; the router's socket is answerable for the hello */
	FLOW_OPEN, /* translated; the backend has acknowledged the hello */
	FLOW_ENDED, /* both FINs are acknowledged; what comes late is still translated */
	FLOW_RESET, /* nothing is translated: whoever speaks is to be reset */
	FLOW_FORGOTTEN, /* a new connection has its addresses: not in `ends` any more */
	FLOW_REAPED, /* user space is about to delete it from `ends` */
};

/* What becomes of the packets of one end.  Sequence numbers are that end's own. */
struct way {
	struct tuple out; /* addresses after the translation */
	__u32 seq, ack, tsval, tsecr; /* added to the packet's */
	__u32 address_sum, port_sum; /* what the checksum changes by */
	__be32 next_hop[4];
	__u32 ifindex; /* where they leave */
	__u32 mtu; /* of the way they take */
	__u8 scale_from, scale_to; /* of the window: as this end meant it, as the other was told */
	__u8 fin_seen, fin_acked;

	/* the program's notes */
	__u32 next; /* the sequence number behind all that has come */
	__u32 acked; /* the highest number that this end has acknowledged */
	__u32 fin; /* the sequence number behind the FIN */
	__u32 heard; /* seconds of the monotonic clock: the last packet */
	__u32 offered; /* bytes beyond `acked` that this end has last said it takes */
	__u32 answered; /* tenths of a second of that clock: it was to be sent an error, or a RST */
	__u64 bytes;
};

/* what user space may note of a flow */
struct note {
	char text[NOTE_BYTES];
};

struct flow {
	__u32 state; /* enum flow_state */
	__u32 owner; /* whose ring hears of it */
	__u64 serial; /* a number that no other flow has had */
	__u32 hello_end; /* the sequence number, towards the backend, behind the hello */
	__u32 stamp; /* TSval of the hello, however often it is sent */
	__u8 hello_sent; /* all of it has left once */
	__u8 is_ipv6;
	__u8 bleach; /* one leg knows ECN, the other does not */
	__u8 transparent; /* the backend's packets are addressed to the client */
	__u8 first; /* the end that sent its FIN first, or the RST */
	__u8 told; /* user space has told of its end */
	__u8 awaited; /* user space wants to hear of EVENT_ACKED */
	__u8 noted; /* there is a note of it */
	struct way ways[2];
};

/* what a router is told */
enum flow_event_kind {
	EVENT_ACKED, /* the hello is acknowledged: the sockets may go */
	EVENT_ENDED,
	EVENT_RESET, /* by one of its ends */
	EVENT_ABANDONED, /* its router ended before the hello was sent */
	EVENT_FRAGMENT, /* a fragment, which can not be translated */
	EVENT_TOO_BIG, /* a packet was dropped: its sender has to be told the MTU */
	EVENT_UNANSWERED, /* an end of a flow that was reset still speaks */
};

struct flow_event {
	__u32 flow;
	__u16 kind;
	__u16 end;
	__u32 seq; /* EVENT_TOO_BIG: of the packet */
	__u32 mtu;
};

/* Why a flow is not installed. */
enum install_result {
	INSTALL_OK,
	INSTALL_BAD,
	INSTALL_UNSEEN, /* the handshake has not passed the hooks with these addresses */
	INSTALL_STACKED, /* it has passed several devices */
	INSTALL_HAIRPIN, /* both ends are behind the same device */
	INSTALL_ASYMMETRIC, /* an end is reached another way than it is heard */
	INSTALL_FORWARDING_OFF,
	INSTALL_MTU, /* what the client may send is too big for the backend, or its way */
	INSTALL_FAMILY,
	INSTALL_NOT_ESTABLISHED,
	INSTALL_OPTIONS, /* timestamps or SACK on one leg only */
	INSTALL_ECN,
	INSTALL_EARLY_DATA, /* the client has sent, or is sending, much more than its hello */
	INSTALL_BACKEND_SPOKE,
	INSTALL_UNSENT, /* the client has not acknowledged all it was sent */
	INSTALL_TAKEN, /* the addresses are another flow's */
	INSTALL_FULL,
};

/* What the install program is given, behind an Ethernet header. */
struct install {
	struct tuple client, backend;
	__u32 flow;
	__u32 owner;
	__u64 serial;
	__u32 hello; /* bytes in the client's receive queue */
	__u8 anywhere; /* for a trial: do not ask which way the ends are reached */
	__u8 transparent;
	__u8 pad[2];
};

/* skb->priority of the router's SYN: which options the client lacks */
enum { LACKS_MARK = 0x53520000, LACKS_TIMESTAMPS = 1, LACKS_SACK = 2 };

/* skb->priority of what emit sends, which has no Ethernet addresses yet */
enum { EMITTED_MARK = 0x53530000 };
