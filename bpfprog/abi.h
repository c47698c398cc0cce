/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The contract between splice.bpf.c and user space.
 *
 * Three readers: clang for the BPF target, the host compiler, and cffi, which has
 * no preprocessor.  So: plain structs and enums, fixed-width types, explicit
 * padding; no macros, no includes, no bit-fields.
 *
 * Each count has one writer.  BPF writes `struct counts`, user space writes
 * `consumed`; they lie in different maps, since a read-modify-write of a shared
 * struct loses counts.
 */

enum {
	/* joined connections at once; the file descriptor limit is met long before */
	MAX_CONNECTIONS = 32768,
	/* two directions, and two sockets, for each connection */
	MAX_DIRECTIONS = 65536,
	/* "went slow" events of 4 + 8 bytes in flight; an event that finds no room is counted */
	EVENTS_BYTES = 262144,
};

/* One direction of a joined connection, keyed by the cookie of its source socket.
 * Cookies are never reused, so a late lookup finds nothing rather than a stranger.
 */
struct direction {
	__u64 peer; /* cookie of the destination socket */
	__u32 slot; /* index of its counts; the connection is slot / 2 */
	__u32 limit; /* bytes that may wait in the kernel between the two sockets */
};

/* What BPF has done with the bytes of one direction; a cache line of its own. */
struct counts {
	__u64 redirected; /* handed to the kernel queue of the destination */
	__u64 passed; /* left to user space because the destination lags */
	__u32 base; /* the destination's write_seq before the first of these bytes */
	__u32 next; /* the source's sequence number of the next byte that is new */
	__u32 begun; /* next is set */
	__u32 based; /* base is set */
	__u64 pad[4];
};

/* Why the event ring is not enough: what the program could not do. */
struct faults {
	__u64 lost_events; /* the ring was full: look at every direction */
};
