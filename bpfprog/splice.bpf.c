// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Join two TCP sockets so that the kernel moves the bytes, with a bound.
 *
 * A redirect frees the receive memory of the source at once and queues on the
 * destination without limit (sk_psock_skb_redirect), so the program itself keeps
 * the bound: it compares what it has redirected with what the destination's TCP
 * has accepted (write_seq), and past the limit it passes the segment to user
 * space, where it stays charged to the source, whose window then closes.
 *
 * Verdicts of one direction are serialised by the lock of its source socket.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include "abi.h"

/* CO-RE: libbpf finds the real offsets in the running kernel's BTF */
#define KERNEL __attribute__((preserve_access_index))
struct sock {
	int sk_wmem_queued;
	int sk_sndbuf;
} KERNEL;
struct inet_sock {
	struct sock sk;
} KERNEL;
struct inet_connection_sock {
	struct inet_sock icsk_inet;
} KERNEL;
struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 write_seq;
	__u32 copied_seq;
} KERNEL;

/* the most that sk_skb_adjust_room takes away at once, and the most steps for a segment */
#define TRIM_STEP 0xfff
#define TRIM_STEPS 17

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, MAX_DIRECTIONS);
	__type(key, __u64);
	__type(value, __u64);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_DIRECTIONS);
	__type(key, __u64);
	__type(value, struct direction);
} directions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_DIRECTIONS);
	__type(key, __u32);
	__type(value, struct counts);
} counts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_DIRECTIONS);
	__type(key, __u32);
	__type(value, __u64);
} consumed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct faults);
} faults SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENTS_BYTES);
} events SEC(".maps");

/* leave the segment to user space, and tell it unless it is about to look anyway */
static int pass(struct counts *count, const volatile __u64 *done, __u32 slot, __u32 len)
{
	/* A full barrier lies between raising passed and reading consumed, as in user
	 * space between raising consumed and reading passed: one of us sees the other.
	 */
	__u64 before = __sync_fetch_and_add(&count->passed, len);
	__u32 zero = 0;

	if (before == *done && bpf_ringbuf_output(&events, &slot, sizeof(slot), 0)) {
		struct faults *fault = bpf_map_lookup_elem(&faults, &zero);

		if (fault)
			__sync_fetch_and_add(&fault->lost_events, 1);
	}
	return SK_PASS;
}

/* Take away the bytes that came before: a retransmission may overlap what was received, and
 * tcp_read_skb hands out whole segments where a reader would begin at copied_seq.
 *
 * Returns how many bytes are new, or -1 when the segment must not be moved.
 */
static int trim(struct __sk_buff *skb, struct counts *count)
{
	/* TCP_SKB_CB(skb)->seq: nobody else has written there since TCP queued the segment */
	__u32 seq = skb->cb[0], len = skb->len, old;

	if (!count->begun) {
		struct bpf_sock *own = skb->sk;
		struct tcp_sock *src = own ? bpf_skc_to_tcp_sock(own) : NULL;

		if (!src)
			return -1;
		count->next = src->copied_seq;
		count->begun = 1;
	}
	old = count->next - seq;
	if ((int)old <= 0) {
		count->next = seq + len;
		return len;
	}
	if (old >= len)
		return 0;
	for (int i = 0; i < TRIM_STEPS && old; i++) {
		__u32 some = old < TRIM_STEP ? old : TRIM_STEP;

		if (bpf_skb_adjust_room(skb, -(int)some, 0, 0))
			return -1;
		old -= some;
		len -= some;
	}
	count->next += len;
	return old ? -1 : (int)len;
}

SEC("sk_skb/stream_verdict")
int verdict(struct __sk_buff *skb)
{
	__u64 self = bpf_get_socket_cookie(skb);
	__u32 slot, limit, accepted, queued;
	const volatile __u64 *done;
	struct direction *dir;
	struct counts *count;
	struct tcp_sock *tcp;
	struct bpf_sock *dst;
	__u64 peer;
	int len, room;

	/* A lone FIN.  Redirected it ends the destination with EPIPE, and passed, when bytes are
	 * queued for this very socket, it ends this one (sk_psock_backlog takes 0 for an error).
	 */
	if (!skb->len)
		return SK_DROP;

	dir = bpf_map_lookup_elem(&directions, &self);
	if (!dir)
		return SK_PASS;
	peer = dir->peer;
	slot = dir->slot;
	limit = dir->limit;

	count = bpf_map_lookup_elem(&counts, &slot);
	done = bpf_map_lookup_elem(&consumed, &slot);
	if (!count || !done)
		return SK_PASS;

	/* Nothing new comes only with a FIN; what could not be trimmed is never moved, and what
	 * is acknowledged and not moved keeps the direction from ever counting as drained.
	 */
	len = trim(skb, count);
	if (len <= 0)
		return SK_DROP;

	/* what user space still holds must not be overtaken */
	if (count->passed != *done)
		return pass(count, done, slot, len);

	/* the redirect helper would drop bytes that are acknowledged already */
	dst = bpf_map_lookup_elem(&sockets, &peer);
	if (!dst)
		return pass(count, done, slot, len);
	tcp = bpf_skc_to_tcp_sock(dst);
	if (!tcp) {
		bpf_sk_release(dst);
		return pass(count, done, slot, len);
	}
	accepted = *(volatile __u32 *)&tcp->write_seq;
	room = tcp->inet_conn.icsk_inet.sk.sk_sndbuf - tcp->inet_conn.icsk_inet.sk.sk_wmem_queued;
	bpf_sk_release(dst);

	/* all that went before is written: consumed is raised only after the write */
	if (!count->based) {
		count->base = accepted - (__u32)*done;
		count->based = 1;
	}

	/* modulo 2^32, as sequence numbers are; the limit keeps the difference small */
	queued = (__u32)count->redirected + (__u32)*done - (accepted - count->base);
	if (queued + len > limit)
		return pass(count, done, slot, len);
	/* A backlog that the send buffer has no room for would poll each jiffy, and hold back
	 * what is passed from this destination, which queues behind it.
	 */
	if (room < (int)queued + len)
		return pass(count, done, slot, len);

	count->redirected += len;
	return bpf_sk_redirect_hash(skb, &sockets, &peer, 0);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
