// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Turn two TCP connections into one: translate the packets of a client to its backend and back, so
 * that the router that joined them is no longer in their way.
 *
 * Two programs hang on devices and two are run by the router:
 *
 *   ingress  notes which way answers come; translates the packets of flows, and sends them out
 *   egress   has the host say nothing on the addresses of a flow, but for the hello
 *   install  looks at the two sockets, at one instant, and makes a flow of them
 *   emit     sends a packet that the router has written: a RST, an ICMP error
 *
 * Rules of this file:
 *
 * 1. What can not be translated is dropped or ends the flow; it never goes on as it is.
 * 2. From the install on, no ACK and no RST of the host's own leaves on a flow's addresses: a
 *    segment that a socket took in passing is one that the network has lost, and is sent again.
 * 3. Only user space frees a flow, and not before ten seconds have passed: no processor can
 *    still be at work on it.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "packet.h"

#define ETH_LEN 14
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_ICMPV6 58
#define IP_FRAGMENT 0x3fff
#define TCP_LEN 20

/* go on with whatever else is attached */
#define NEXT -1
#define DROP 2

#define FIN 1
#define SYN 2
#define RST 4
#define ACK 16
#define URG 32

#define ESTABLISHED 1

/* RFC 3168 */
#define ECN_MASK 3
#define ECN_CE 3

/* the most extension headers of an IPv6 packet that are stepped over */
#define MAX_EXTENSIONS 4
/* the furthest that a TCP header may begin: Ethernet, IPv6, and extensions of 255 bytes */
#define MAX_OFFSET 309

struct ipv4 {
	__u8 ihl : 4, version : 4;
	__u8 tos;
	__be16 len, id, fragment;
	__u8 ttl, protocol;
	__u16 check;
	__be32 from, to;
};

struct ipv6 {
	__u8 class_high : 4, version : 4;
	__u8 flow_high : 4, class_low : 4;
	__be16 flow_low, len;
	__u8 next, hops;
	__be32 from[4], to[4];
};

struct tcp {
	__be16 from_port, to_port;
	__be32 seq, ack;
	__u8 unused : 4, words : 4;
	__u8 flags;
	__be16 window;
	__u16 check, urgent;
};

/* CO-RE: libbpf finds the real offsets in the running kernel's BTF */
#define KERNEL __attribute__((preserve_access_index))
struct rb_node {
	unsigned long rb_parent;
} KERNEL;
struct rb_root {
	struct rb_node *rb_node;
} KERNEL;
struct tcp_options_received {
	__u32 ts_recent;
	__u16 tstamp_ok : 1;
	__u16 sack_ok : 3;
	__u16 snd_wscale : 4, rcv_wscale : 4;
	__u16 user_mss, mss_clamp;
} KERNEL;
struct tcp_sock {
	__u64 bytes_received;
	__u32 write_seq, snd_una, snd_wnd, rcv_nxt, copied_seq, tsoffset;
	__u16 advmss;
	__u8 ecn_flags;
	__u8 tcp_usec_ts : 1;
	struct rb_root out_of_order_queue;
	struct tcp_options_received rx_opt;
} KERNEL;

#define TCP_ECN_OK 1

/* what may come before a hello: version 2 with all that we have seen anyone write */
#define MAX_PROXY_HEADER 1024

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_ENDS);
	__type(key, struct tuple);
	__type(value, __u32);
} ends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_FLOWS);
	__type(key, __u32);
	__type(value, struct flow);
} flows SEC(".maps");

/* the SYNs and SYN-ACKs that this host has sent, by the addresses of what answers them */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_SEEN);
	__type(key, struct tuple);
	__type(value, struct passage);
} begun SEC(".maps");

/* The device by which the answer has come.  Apart, because anyone can have this host send SYN-ACKs,
 * but only who gets them can answer.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_SEEN);
	__type(key, struct tuple);
	__type(value, __u32);
} seen SEC(".maps");

/* what a flow was before its packets were translated: user space's alone */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FLOWS);
	__type(key, __u32);
	__type(value, struct note);
} notes SEC(".maps");

struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, FLOW_EVENTS_BYTES);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_OWNERS);
	__type(key, __u32);
	__array(values, struct ring);
} rings SEC(".maps");

/* events that found no room, or no ring, by owner */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, MAX_OWNERS);
	__type(key, __u32);
	__type(value, __u64);
} lost SEC(".maps");

/* --- small things --- */

static __always_inline __u32 fold32(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return sum;
}

static __always_inline __u16 fold16(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* seconds that nobody sets */
static __always_inline __u32 seconds(void)
{
	return bpf_ktime_get_coarse_ns() / 1000000000;
}

/* whether *a* lies behind *b*, modulo 2^32 as sequence numbers are (RFC 9293, 3.4) */
static __always_inline bool behind(__u32 a, __u32 b)
{
	return (__s32)(a - b) > 0;
}

static __always_inline void map_ipv4(__be32 to[4], __be32 address)
{
	to[0] = 0;
	to[1] = 0;
	to[2] = bpf_htonl(0xffff);
	to[3] = address;
}

static __always_inline void copy_address(__be32 to[4], const __be32 from[4])
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

static __always_inline void turn_round(const struct tuple *tuple, struct tuple *other)
{
	copy_address(other->from, tuple->to);
	copy_address(other->to, tuple->from);
	other->from_port = tuple->to_port;
	other->to_port = tuple->from_port;
}

static __always_inline bool are_turned_round(const struct tuple *tuple, const struct tuple *other)
{
	__u32 differ = 0;

	for (int i = 0; i < 4; i++)
		differ |= (tuple->from[i] ^ other->to[i]) | (tuple->to[i] ^ other->from[i]);
	return !differ && tuple->from_port == other->to_port && tuple->to_port == other->from_port;
}

static __noinline int tell(__u32 owner, struct flow_event *event)
{
	void *ring = bpf_map_lookup_elem(&rings, &owner);
	__u64 *count;

	if (!event)
		return 0;
	if (ring && !bpf_ringbuf_output(ring, event, sizeof(*event), 0))
		return 0;
	count = bpf_map_lookup_elem(&lost, &owner);
	if (count)
		__sync_fetch_and_add(count, 1);
	return 0;
}

static __always_inline void tell_of(struct flow *flow, __u32 number, __u16 kind, __u16 end)
{
	struct flow_event event = { .flow = number, .kind = kind, .end = end };

	tell(flow->owner, &event);
}

/* Whether *end* may be answered by the router, which whoever sends can ask for with each packet:
 * ten times a second (RFC 1812, 4.3.2.8; RFC 4443, 2.4).
 */
static __always_inline bool may_answer(struct flow *flow, __u32 end)
{
	__u32 now = bpf_ktime_get_coarse_ns() / 100000000;

	return __sync_lock_test_and_set(&flow->ways[end].answered, now) != now;
}

/* Leave *from* for *to*; true for the one who does. */
static __always_inline bool leave(struct flow *flow, __u32 from, __u32 to)
{
	return __sync_val_compare_and_swap(&flow->state, from, to) == from;
}

static __always_inline bool end_flow(struct flow *flow, __u32 number, __u32 state, __u16 kind,
				     __u16 end)
{
	/* in the order that states follow each other: none is left between two tries */
	if (!leave(flow, FLOW_HELLO, state) && !leave(flow, FLOW_OPEN, state) &&
	    (state == FLOW_ENDED || !leave(flow, FLOW_ENDED, state)))
		return false;
	if (kind == EVENT_RESET)
		flow->first = end;
	tell_of(flow, number, kind, end);
	return true;
}

static __always_inline struct flow *find(const struct tuple *tuple, __u32 *number, __u32 *end)
{
	__u32 *found = bpf_map_lookup_elem(&ends, tuple);

	if (!found)
		return NULL;
	*number = *found >> 1;
	*end = *found & 1;
	return bpf_map_lookup_elem(&flows, number);
}

/* --- reading a packet --- */

struct packet {
	struct tuple tuple;
	__u32 l4; /* where the header of the transport begins */
	__u32 payload; /* bytes of TCP data */
	__u32 header; /* bytes of the TCP header */
	__u32 size; /* bytes of the IP packet, or of one that it is cut into */
	__u32 seq, ack;
	__u8 protocol;
	__u8 flags;
	bool is_ipv6;
	bool fragment;
};

/* Step over extension headers (RFC 8200, 4): hop-by-hop, routing, destination options.
 *
 * Returns the offset of the transport's header, 0 where it is not found.
 */
static __noinline __u32 step_over(struct __sk_buff *skb, __u8 *protocol)
{
	__u32 at = ETH_LEN + sizeof(struct ipv6);
	__u8 next, head[2];

	if (!protocol)
		return 0;
	next = *protocol;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		if (next != 0 && next != 43 && next != 60)
			break;
		if (bpf_skb_load_bytes(skb, at, head, sizeof(head)))
			return 0;
		next = head[0];
		at += 8 * (head[1] + 1);
		if (at > MAX_OFFSET)
			return 0;
	}
	*protocol = next;
	return at;
}

/* Make the headers of a TCP packet readable and writable, and read them.
 *
 * Returns 0 for a TCP packet, else -1; `protocol` and `l4` may be used then where they are set.
 */
static __always_inline int read_packet(struct __sk_buff *skb, struct packet *packet)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 l4, header, total, gso;
	struct tcp *tcp;

	packet->protocol = 0;
	packet->fragment = false;
	if (skb->vlan_present)
		return -1;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4 *ip = data + ETH_LEN;

		if ((void *)(ip + 1) > end) {
			if (bpf_skb_pull_data(skb, ETH_LEN + sizeof(*ip)))
				return -1;
			data = (void *)(long)skb->data;
			end = (void *)(long)skb->data_end;
			ip = data + ETH_LEN;
			if ((void *)(ip + 1) > end)
				return -1;
		}
		packet->is_ipv6 = false;
		packet->protocol = ip->protocol;
		l4 = ETH_LEN + ip->ihl * 4;
		packet->l4 = l4;
		if (ip->fragment & bpf_htons(IP_FRAGMENT)) {
			/* the first one has the ports */
			if (ip->fragment & bpf_htons(0x1fff))
				return -1;
			packet->fragment = true;
		}
		total = bpf_ntohs(ip->len);
		map_ipv4(packet->tuple.from, ip->from);
		map_ipv4(packet->tuple.to, ip->to);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6 *ip = data + ETH_LEN;
		__u8 next;

		if ((void *)(ip + 1) > end) {
			if (bpf_skb_pull_data(skb, ETH_LEN + sizeof(*ip)))
				return -1;
			data = (void *)(long)skb->data;
			end = (void *)(long)skb->data_end;
			ip = data + ETH_LEN;
			if ((void *)(ip + 1) > end)
				return -1;
		}
		packet->is_ipv6 = true;
		total = bpf_ntohs(ip->len);
		if (total)
			total += sizeof(*ip);
		copy_address(packet->tuple.from, ip->from);
		copy_address(packet->tuple.to, ip->to);
		next = ip->next;
		l4 = ETH_LEN + sizeof(*ip);
		if (next != IPPROTO_TCP && next != IPPROTO_ICMPV6) {
			l4 = step_over(skb, &next);
			if (!l4)
				return -1;
			if (next == 44) {
				__u8 head[8];

				if (bpf_skb_load_bytes(skb, l4, head, sizeof(head)) || head[2] ||
				    head[3] & 0xf8)
					return -1;
				/* all of a packet, or the first of several (RFC 6946) */
				packet->fragment = head[3] & 1;
				next = head[0];
				l4 += 8;
			}
			data = (void *)(long)skb->data;
			end = (void *)(long)skb->data_end;
		}
		packet->protocol = next;
		packet->l4 = l4;
	} else {
		return -1;
	}
	if (packet->protocol != IPPROTO_TCP)
		return -1;
	if (l4 > MAX_OFFSET)
		return -1;
	tcp = data + l4;
	if ((void *)(tcp + 1) > end) {
		if (bpf_skb_pull_data(skb, l4 + TCP_LEN))
			return -1;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		tcp = data + l4;
		if ((void *)(tcp + 1) > end)
			return -1;
	}
	header = tcp->words * 4;
	packet->header = header;
	packet->flags = tcp->flags;
	packet->seq = bpf_ntohl(tcp->seq);
	packet->ack = bpf_ntohl(tcp->ack);
	packet->tuple.from_port = tcp->from_port;
	packet->tuple.to_port = tcp->to_port;
	/* a length of 0: more than 64 KiB, put together by this host (BIG TCP) */
	if (!total)
		total = skb->len - ETH_LEN;
	if (header < TCP_LEN || total < l4 - ETH_LEN + header)
		return -1;
	packet->payload = total - (l4 - ETH_LEN) - header;
	gso = skb->gso_size;
	packet->size = gso ? l4 - ETH_LEN + header + gso : total;
	return 0;
}

/* --- options that do not lie where Linux puts them --- */

#define MAX_OPTIONS 40

struct options {
	struct __sk_buff *skb;
	__u64 sum; /* what the checksum changes by */
	__u32 at, i, size;
	__u32 tsval, tsecr, ack;
};

/* what a change of *sum* at the offset *at* of the options adds to the checksum, whose words begin
 * at even ones (RFC 1071, 2)
 */
static __always_inline __u32 at_offset(__u32 sum, __u32 at)
{
	__u16 half = fold16(sum);

	return at & 1 ? (__u16)(half << 8 | half >> 8) : sum;
}

/* Read the head of the option that comes next, and go on behind it.
 *
 * Returns its kind, with its size and its offset; 0 at the end, or where it is not written as RFC
 * 9293, 3.1 has it; 1 for a NOP.
 */
static __always_inline __u8 next_option(struct options *options, __u32 *at, __u32 *size)
{
	__u32 i = options->i;
	__u8 head[2];

	if (i + 2 > options->size || i >= MAX_OPTIONS)
		return 0;
	if (bpf_skb_load_bytes(options->skb, options->at + i, head, sizeof(head)))
		return 0;
	*at = i;
	*size = head[0] == 1 ? 1 : head[1];
	if (head[0] > 1 && (head[1] < 2 || i + head[1] > options->size))
		return 0;
	options->i = i + *size;
	return head[0];
}

/* add to two words at an offset *at* of any alignment */
static __always_inline int add_words(struct options *options, __u32 at, __u32 first, __u32 second)
{
	__be32 was[2], is[2];
	__u32 sum;

	if (bpf_skb_load_bytes(options->skb, options->at + at, was, sizeof(was)))
		return -1;
	is[0] = bpf_htonl(bpf_ntohl(was[0]) + first);
	is[1] = bpf_htonl(bpf_ntohl(was[1]) + second);
	sum = fold32((__u64)(__u32)~was[0] + (__u32)~was[1] + is[0] + is[1]);
	options->sum += at_offset(sum, at);
	return bpf_skb_store_bytes(options->skb, options->at + at, is, sizeof(is), 0);
}

static long translate_option(__u32 n, struct options *options)
{
	__u32 at = 0, size = 0;
	__u8 kind = next_option(options, &at, &size);

	if (kind == 8 && size == 10) {
		add_words(options, at + 2, options->tsval, options->tsecr);
	} else if (kind == 5) {
		for (int block = 0; block < 4; block++)
			if (size >= 10 + 8 * block)
				add_words(options, at + 2 + 8 * block, options->ack, options->ack);
	}
	return !kind;
}

static __noinline __u32 translate_options(struct __sk_buff *skb, struct way *way, __u32 at,
					  __u32 size)
{
	struct options options = { .skb = skb, .at = at, .size = size };

	if (!way)
		return 0;
	options.tsval = way->tsval;
	options.tsecr = way->tsecr;
	options.ack = way->ack;
	bpf_loop(MAX_OPTIONS, translate_option, &options, 0);
	return fold32(options.sum);
}

/* The router's SYN: do not offer the backend what the client does not have. */
static long blank_option(__u32 n, struct options *options)
{
	static const __u8 nothing[12] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
	__u8 was[12] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 };
	__u32 at = 0, size = 0;
	__u8 kind = next_option(options, &at, &size);

	if (kind == 8 && size == 10 && options->tsval) {
		if (bpf_skb_load_bytes(options->skb, options->at + at, was, 10) ||
		    bpf_skb_store_bytes(options->skb, options->at + at, nothing, 10, 0))
			return 1;
	} else if (kind == 4 && size == 2 && options->ack) {
		if (bpf_skb_load_bytes(options->skb, options->at + at, was, 2) ||
		    bpf_skb_store_bytes(options->skb, options->at + at, nothing, 2, 0))
			return 1;
	} else {
		return !kind;
	}
	options->sum += at_offset(bpf_csum_diff((__be32 *)was, 12, (__be32 *)nothing, 12, 0), at);
	return 0;
}

static __noinline int blank_options(struct __sk_buff *skb, __u32 at, __u32 size, __u32 lacks)
{
	struct options options = { .skb = skb, .at = at, .size = size };

	options.tsval = lacks & LACKS_TIMESTAMPS;
	options.ack = lacks & LACKS_SACK;
	bpf_loop(MAX_OPTIONS, blank_option, &options, 0);
	if (options.sum)
		bpf_l4_csum_replace(skb, at - TCP_LEN + offsetof(struct tcp, check), 0,
				    fold32(options.sum), 0);
	return 0;
}

/* --- the way a packet takes --- */

/* Look up how *to* is reached from *ifindex*.  Returns as bpf_fib_lookup(). */
static __noinline int find_way(struct __sk_buff *skb, struct way *way, __u32 ifindex, bool is_ipv6)
{
	struct bpf_fib_lookup fib = {};
	int result;

	if (!way)
		return -1;
	fib.ifindex = ifindex;
	fib.l4_protocol = IPPROTO_TCP;
	fib.sport = way->out.from_port;
	fib.dport = way->out.to_port;
	fib.tot_len = 1; /* for which the kernel answers with the MTU */
	if (is_ipv6) {
		fib.family = AF_INET6;
		copy_address(fib.ipv6_src, way->out.from);
		copy_address(fib.ipv6_dst, way->out.to);
	} else {
		fib.family = AF_INET;
		fib.ipv4_src = way->out.from[3];
		fib.ipv4_dst = way->out.to[3];
	}
	result = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	/* a neighbour that is not known yet is asked for when the packet leaves */
	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
		return result;
	way->ifindex = fib.ifindex;
	/* else it still holds what was asked */
	if (result == BPF_FIB_LKUP_RET_SUCCESS)
		way->mtu = fib.mtu_result;
	if (is_ipv6)
		copy_address(way->next_hop, fib.ipv6_dst);
	else
		map_ipv4(way->next_hop, fib.ipv4_dst);
	return 0;
}

static __always_inline int send_on(struct way *way, bool is_ipv6)
{
	struct bpf_redir_neigh next = {};

	if (is_ipv6) {
		next.nh_family = AF_INET6;
		copy_address(next.ipv6_nh, way->next_hop);
	} else {
		next.nh_family = AF_INET;
		next.ipv4_nh = way->next_hop[3];
	}
	return bpf_redirect_neigh(way->ifindex, &next, sizeof(next), 0);
}

/* --- translation --- */

#define ADD(field, delta, sum)                                                                     \
	do {                                                                                       \
		__be32 was = (field);                                                              \
		__be32 is = bpf_htonl(bpf_ntohl(was) + (delta));                                   \
		(field) = is;                                                                      \
		(sum) += (__u32)~was;                                                              \
		(sum) += is;                                                                       \
	} while (0)

/* Have the addresses, the hop limit and the ECN bits say what they must; false for a packet that
 * has to be dropped.  *change* is what the sum of an IPv6 header, which has no checksum, changes
 * by.
 */
static __always_inline bool translate_ip(void *data, void *end, struct flow *flow, struct way *way,
					 __u32 *change)
{
	if (flow->is_ipv6) {
		struct ipv6 *ip = data + ETH_LEN;
		__u16 *word;

		if ((void *)(ip + 1) > end || ip->hops <= 1)
			return false;
		word = (__u16 *)&ip->next;
		*change = (__u16) ~*word;
		ip->hops--;
		*change += *word;
		if (flow->bleach) {
			/* RFC 6040, 4.2: who does not know ECN knows congestion by a loss */
			if ((ip->class_low & ECN_MASK) == ECN_CE)
				return false;
			word = (__u16 *)ip;
			*change += (__u16) ~*word;
			ip->class_low &= ~ECN_MASK;
			*change += *word;
		}
		*change = fold32((__u64)*change + way->address_sum);
		copy_address(ip->from, way->out.from);
		copy_address(ip->to, way->out.to);
	} else {
		struct ipv4 *ip = data + ETH_LEN;
		__u32 sum;
		__u16 *word;

		if ((void *)(ip + 1) > end || ip->ttl <= 1)
			return false;
		sum = (__u16)~ip->check;
		word = (__u16 *)&ip->ttl;
		sum += (__u16) ~*word;
		ip->ttl--;
		sum += *word;
		if (flow->bleach) {
			/* RFC 6040, 4.2: who does not know ECN knows congestion by a loss */
			if ((ip->tos & ECN_MASK) == ECN_CE)
				return false;
			word = (__u16 *)ip;
			sum += (__u16) ~*word;
			ip->tos &= ~ECN_MASK;
			sum += *word;
		}
		sum += fold16(way->address_sum);
		ip->check = ~fold16(sum);
		ip->from = way->out.from[3];
		ip->to = way->out.to[3];
	}
	return true;
}

/* Translate timestamps and SACK blocks where Linux, and most others, put them.
 *
 * Returns false where they lie otherwise.
 */
static __always_inline bool translate_usual(void *options, void *end, __u32 size, struct way *way,
					    __u64 *sum)
{
	__be32 *word = options;
	__u32 kind, blocks;

	if ((void *)(word + 1) > end)
		return false;
	if (*word == bpf_htonl(0x0101080a)) {
		if ((void *)(word + 3) > end)
			return false;
		/* more follows than is looked at here, and it begins unusually */
		if (size > 12) {
			if ((void *)(word + 4) > end || bpf_ntohl(word[3]) >> 8 != 0x010105)
				return false;
		}
		ADD(word[1], way->tsval, *sum);
		ADD(word[2], way->tsecr, *sum);
		if (size <= 12)
			return true;
		word += 3;
	}
	kind = bpf_ntohl(*word);
	if (kind >> 8 != 0x010105)
		return false;
	blocks = ((kind & 0xff) - 2) / 4;
	for (__u32 i = 0; i < 8; i++) {
		if (i >= blocks)
			break;
		if ((void *)(word + i + 2) > end)
			break;
		ADD(word[i + 1], way->ack, *sum);
	}
	return true;
}

/* processors that may be at work on packets of one end in the same instant */
#define MAX_RIVALS 4
/* more than the window that was last seen: it may have been larger, and segments overtake */
#define SLACK 131072

/* Whether a number of *end*'s lies where its other end expects one.  Anyone can write addresses,
 * but not this: what does not is still translated, and left to the other end, but nothing is noted.
 */
static __always_inline bool is_in_window(const struct flow *flow, __u32 end, __u32 number)
{
	const struct way *other = &flow->ways[!end];
	__u32 acknowledged = other->acked + other->ack;

	return number - acknowledged <= other->offered + SLACK || acknowledged - number <= SLACK;
}

/* Whether the other end has sent what *end* acknowledges, at the most all and its FIN. */
static __always_inline bool has_sent(const struct flow *flow, __u32 end, __u32 ack)
{
	const struct way *other = &flow->ways[!end];

	return !behind(ack, other->next + other->seq + 1);
}

/* What *end* has sent: how far it is, and whether the other one's FIN is acknowledged. */
static __always_inline void take_note(struct flow *flow, __u32 number, __u32 end,
				      const struct packet *packet, __u32 seq, __u32 ack,
				      __u32 window)
{
	struct way *way = &flow->ways[end], *other = &flow->ways[!end];
	__u32 next = way->next, upto = seq + packet->payload;

	/* RFC 5961, 5.2: nobody takes a segment that acknowledges what can not have been sent.  The
	 * room that was offered tells that; what has been sent would, but a segment of the other
	 * end that is at work elsewhere is not noted yet.
	 */
	if ((packet->flags & (SYN | RST | ACK)) != ACK || !is_in_window(flow, end, upto) ||
	    behind(ack, way->acked + way->offered + SLACK))
		return;
	/* the FIN has a number, but is no byte */
	if (way->fin_seen && behind(upto, way->fin - 1))
		upto = way->fin - 1;
	/* Every advance is added once, by whoever makes it; so the sum is exact. */
	for (int i = 0; i < MAX_RIVALS && behind(upto, next); i++) {
		__u32 found = __sync_val_compare_and_swap(&way->next, next, upto);

		if (found == next) {
			__sync_fetch_and_add(&way->bytes, upto - next);
			break;
		}
		next = found;
	}
	if (!has_sent(flow, end, ack))
		return;
	/* not of a segment that was overtaken */
	if (!behind(way->acked, ack)) {
		way->acked = ack;
		way->offered = window;
	}
	if (other->fin_seen && !other->fin_acked && !behind(other->fin, ack + way->ack))
		other->fin_acked = 1;
	/* with bytes behind it, it is none; what is sent later has the number behind it */
	if (packet->flags & FIN && !way->fin_acked && !behind(next, upto + 1)) {
		way->fin = upto + 1;
		way->fin_seen = 1;
		if (!other->fin_seen)
			flow->first = end;
	}
	if (way->fin_acked && other->fin_acked)
		end_flow(flow, number, FLOW_ENDED, EVENT_ENDED, end);
}

/* Whether the other end will take this RST for one (RFC 5961, 3.2): it must have the number that
 * is expected, which is the last one acknowledged, or, when all has arrived, the next.
 */
static __always_inline bool is_final(const struct flow *flow, __u32 end, __u32 seq)
{
	const struct way *way = &flow->ways[end], *other = &flow->ways[!end];

	return seq == way->next || seq + way->seq == other->acked;
}

static __always_inline int translate(struct __sk_buff *skb, struct flow *flow, __u32 number,
				     __u32 end, const struct packet *packet)
{
	struct way *way = &flow->ways[end];
	void *data, *data_end;
	__u32 l4 = packet->l4, now = seconds(), seq, ack, window, offered = 0, change = 0;
	struct tcp *tcp;
	bool unusual = false;
	__u16 was, is;
	__u64 sum;

	if (l4 > MAX_OFFSET || packet->header > 60)
		return DROP;
	if (bpf_skb_pull_data(skb, l4 + packet->header))
		return DROP;
	if (way->heard != now) {
		/* routes change; a container's address can not, without the end of its flows */
		way->heard = now;
		find_way(skb, way, skb->ifindex, flow->is_ipv6);
	}
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	tcp = data + l4;
	if ((void *)(tcp + 1) > data_end)
		return DROP;
	seq = bpf_ntohl(tcp->seq);
	ack = bpf_ntohl(tcp->ack);
	if (packet->size > way->mtu) {
		struct flow_event event = {
			.flow = number,
			.kind = EVENT_TOO_BIG,
			.end = end,
			.seq = seq,
			.mtu = way->mtu,
		};

		if (may_answer(flow, end))
			tell(flow->owner, &event);
		return DROP;
	}
	if (!translate_ip(data, data_end, flow, way, &change))
		return DROP;

	sum = way->port_sum;
	tcp->from_port = way->out.from_port;
	tcp->to_port = way->out.to_port;
	ADD(tcp->seq, way->seq, sum);
	if (packet->flags & ACK)
		ADD(tcp->ack, way->ack, sum);
	if (!(packet->flags & SYN)) {
		was = tcp->window;
		offered = bpf_ntohs(was) << way->scale_from;
		window = offered >> way->scale_to;
		if (window > 65535)
			window = 65535;
		/* what is open stays open, or nobody would ask again */
		if (!window && was)
			window = 1;
		is = bpf_htons(window);
		tcp->window = is;
		sum += (__u16)~was;
		sum += is;
	}
	if (packet->flags & URG) {
		/* the byte stays where it is, as in every hand-off: sockets have it inline */
		__u16 *word = (__u16 *)tcp + 6;

		sum += (__u16) ~*word;
		tcp->flags &= ~URG;
		sum += *word;
		sum += (__u16)~tcp->urgent;
		tcp->urgent = 0;
	}
	if (packet->header > TCP_LEN)
		unusual = !translate_usual(tcp + 1, data_end, packet->header - TCP_LEN, way, &sum);

	if (packet->flags & RST && is_final(flow, end, seq))
		end_flow(flow, number, FLOW_RESET, EVENT_RESET, end);
	take_note(flow, number, end, packet, seq, ack, offered);

	if (unusual)
		sum += translate_options(skb, way, l4 + TCP_LEN, packet->header - TCP_LEN);
	bpf_l4_csum_replace(skb, l4 + offsetof(struct tcp, check), 0, way->address_sum,
			    BPF_F_PSEUDO_HDR);
	bpf_l4_csum_replace(skb, l4 + offsetof(struct tcp, check), 0, fold32(sum), 0);
	/* a sum over the whole packet, if the device has made one (CHECKSUM_COMPLETE) */
	if (change)
		bpf_csum_update(skb, change);
	return send_on(way, flow->is_ipv6);
}

/* --- ICMP: a router on the way that needs smaller packets --- */

struct inner4 {
	struct ipv4 ip;
	__be16 from_port, to_port;
	__be32 seq;
};

struct inner6 {
	struct ipv6 ip;
	__be16 from_port, to_port;
	__be32 seq;
};

/* The packet inside is one that we sent; whoever it came from is to hear of it, in its own numbers.
 * The way of those who answered it, turned round, has its addresses.
 */
static __noinline int icmp4(struct __sk_buff *skb)
{
	__u32 at = ETH_LEN + sizeof(struct ipv4), number = 0, end = 0;
	struct inner4 was, is;
	struct tuple tuple;
	struct flow *flow;
	struct way *way;
	__u8 head[8];
	__be32 to[1];
	__s64 diff;

	/* RFC 1191: destination unreachable, fragmentation needed */
	if (bpf_skb_load_bytes(skb, at, head, sizeof(head)) || head[0] != 3 || head[1] != 4)
		return NEXT;
	if (bpf_skb_load_bytes(skb, at + sizeof(head), &was, sizeof(was)))
		return NEXT;
	if (was.ip.ihl != 5 || was.ip.protocol != IPPROTO_TCP)
		return NEXT;
	map_ipv4(tuple.from, was.ip.to);
	map_ipv4(tuple.to, was.ip.from);
	tuple.from_port = was.to_port;
	tuple.to_port = was.from_port;
	flow = find(&tuple, &number, &end);
	if (!flow || (flow->state != FLOW_OPEN && flow->state != FLOW_HELLO))
		return NEXT;
	way = &flow->ways[end & 1];
	is = was;
	is.ip.from = way->out.to[3];
	is.ip.to = way->out.from[3];
	is.from_port = way->out.to_port;
	is.to_port = way->out.from_port;
	is.seq = bpf_htonl(bpf_ntohl(was.seq) + way->ack);
	/* of the header inside, all that has changed is its addresses */
	diff = bpf_csum_diff(&was.ip.from, 8, &is.ip.from, 8, (__u16)~was.ip.check);
	is.ip.check = ~fold16(fold32(diff));
	diff = bpf_csum_diff((__be32 *)&was, sizeof(was), (__be32 *)&is, sizeof(is), 0);
	if (bpf_skb_store_bytes(skb, at + sizeof(head), &is, sizeof(is), 0) ||
	    bpf_l4_csum_replace(skb, at + 2, 0, diff, 0))
		return DROP;
	if (bpf_skb_load_bytes(skb, ETH_LEN + offsetof(struct ipv4, to), to, sizeof(to)))
		return DROP;
	if (bpf_l3_csum_replace(skb, ETH_LEN + offsetof(struct ipv4, check), to[0], way->out.to[3],
				4))
		return DROP;
	to[0] = way->out.to[3];
	if (bpf_skb_store_bytes(skb, ETH_LEN + offsetof(struct ipv4, to), to, sizeof(to), 0))
		return DROP;
	return send_on(way, false);
}

static __noinline int icmp6(struct __sk_buff *skb)
{
	__u32 at = ETH_LEN + sizeof(struct ipv6), number = 0, end = 0;
	struct inner6 was, is;
	struct tuple tuple;
	struct flow *flow;
	struct way *way;
	__be32 to[4];
	__u8 head[8];
	__s64 diff;

	/* RFC 8201: packet too big */
	if (bpf_skb_load_bytes(skb, at, head, sizeof(head)) || head[0] != 2)
		return NEXT;
	if (bpf_skb_load_bytes(skb, at + sizeof(head), &was, sizeof(was)))
		return NEXT;
	if (was.ip.next != IPPROTO_TCP)
		return NEXT;
	copy_address(tuple.from, was.ip.to);
	copy_address(tuple.to, was.ip.from);
	tuple.from_port = was.to_port;
	tuple.to_port = was.from_port;
	flow = find(&tuple, &number, &end);
	if (!flow || (flow->state != FLOW_OPEN && flow->state != FLOW_HELLO))
		return NEXT;
	way = &flow->ways[end & 1];
	is = was;
	copy_address(is.ip.from, way->out.to);
	copy_address(is.ip.to, way->out.from);
	is.from_port = way->out.to_port;
	is.to_port = way->out.from_port;
	is.seq = bpf_htonl(bpf_ntohl(was.seq) + way->ack);
	diff = bpf_csum_diff((__be32 *)&was, sizeof(was), (__be32 *)&is, sizeof(is), 0);
	if (bpf_skb_store_bytes(skb, at + sizeof(head), &is, sizeof(is), 0) ||
	    bpf_l4_csum_replace(skb, at + 2, 0, diff, 0))
		return DROP;
	if (bpf_skb_load_bytes(skb, ETH_LEN + offsetof(struct ipv6, to), to, sizeof(to)))
		return DROP;
	diff = bpf_csum_diff(to, 16, way->out.to, 16, 0);
	if (bpf_l4_csum_replace(skb, at + 2, 0, diff, BPF_F_PSEUDO_HDR))
		return DROP;
	bpf_csum_update(skb, diff);
	copy_address(to, way->out.to);
	if (bpf_skb_store_bytes(skb, ETH_LEN + offsetof(struct ipv6, to), to, sizeof(to), 0))
		return DROP;
	return send_on(way, true);
}

/* Take note of a SYN or SYN-ACK of this host's own, with the addresses of what is to answer it. */
static __always_inline void note_syn(const struct tuple *tuple, const struct packet *packet)
{
	struct passage begins = { .answer = packet->seq + 1 };
	struct passage *passage = bpf_map_lookup_elem(&begun, tuple);

	/* not of one that is sent again, or passes a second device */
	if (!passage || passage->answer != begins.answer)
		bpf_map_update_elem(&begun, tuple, &begins, BPF_ANY);
}

/* Take note of the device by which it is answered.  What comes by a macvlan's parent comes by the
 * macvlan, too; and what is sent again may come another way.
 */
static __always_inline void note_answer(const struct tuple *tuple, const struct packet *packet,
					__u32 device)
{
	struct passage *passage;

	if (!(packet->flags & ACK))
		return;
	passage = bpf_map_lookup_elem(&begun, tuple);
	if (!passage || passage->answer != packet->ack || passage->device == device ||
	    passage->device == SEVERAL)
		return;
	passage->device = passage->device ? SEVERAL : device;
	bpf_map_update_elem(&seen, tuple, &passage->device, BPF_ANY);
}

/* --- in --- */

/* A new connection has the addresses of one that is over.  Returns what becomes of its SYN. */
static __always_inline int forget(struct flow *flow)
{
	struct tuple end;

	if (!leave(flow, FLOW_ENDED, FLOW_FORGOTTEN) && !leave(flow, FLOW_RESET, FLOW_FORGOTTEN))
		return NEXT;
	turn_round(&flow->ways[CLIENT_END].out, &end);
	bpf_map_delete_elem(&ends, &end);
	turn_round(&flow->ways[BACKEND_END].out, &end);
	bpf_map_delete_elem(&ends, &end);
	return NEXT;
}

SEC("tc")
int ingress(struct __sk_buff *skb)
{
	struct packet packet;
	__u32 number = 0, end = 0, state;
	struct flow *flow;

	if (read_packet(skb, &packet)) {
		if (packet.protocol == IPPROTO_ICMP && packet.l4 == ETH_LEN + sizeof(struct ipv4))
			return icmp4(skb);
		if (packet.protocol == IPPROTO_ICMPV6 && packet.l4 == ETH_LEN + sizeof(struct ipv6))
			return icmp6(skb);
		return NEXT;
	}
	flow = find(&packet.tuple, &number, &end);
	if (!flow) {
		note_answer(&packet.tuple, &packet, skb->ifindex);
		return NEXT;
	}
	end &= 1;
	/* an entry that is older than its flow; addresses that only look like these */
	if (packet.is_ipv6 != flow->is_ipv6 ||
	    !are_turned_round(&packet.tuple, &flow->ways[!end].out))
		return NEXT;
	/* nobody speaks for an end from elsewhere than where it is */
	if (flow->ways[!end].ifindex && flow->ways[!end].ifindex != skb->ifindex)
		return DROP;
	state = *(volatile __u32 *)&flow->state;
	switch (state) {
	case FLOW_HELLO:
	case FLOW_OPEN:
		break;
	case FLOW_ENDED:
	case FLOW_RESET:
		if (packet.flags & SYN) {
			note_answer(&packet.tuple, &packet, skb->ifindex);
			return forget(flow);
		}
		if (state == FLOW_ENDED)
			break;
		if (packet.flags & RST)
			return DROP;
		/* the host answers with a RST to what is addressed to it */
		if (!flow->transparent || end == CLIENT_END)
			return NEXT;
		/* one that has not believed a RST tells the number that it waits for (RFC 5961) */
		if (packet.flags & ACK)
			flow->ways[end].acked = packet.ack;
		if (may_answer(flow, end))
			tell_of(flow, number, EVENT_UNANSWERED, end);
		return DROP;
	default:
		return NEXT;
	}
	if (packet.fragment) {
		if (is_in_window(flow, end, packet.seq))
			end_flow(flow, number, FLOW_RESET, EVENT_FRAGMENT, end);
		return DROP;
	}
	if (state == FLOW_HELLO && end == BACKEND_END && packet.flags & ACK) {
		/* Mostly that is so before the router has come to wait for it. */
		if (!behind(flow->hello_end, packet.ack) && has_sent(flow, end, packet.ack) &&
		    leave(flow, FLOW_HELLO, FLOW_OPEN) && *(volatile __u8 *)&flow->awaited)
			tell_of(flow, number, EVENT_ACKED, end);
		/* what answers the router is the router's, a SYN-ACK that is sent again too */
		if (!behind(packet.ack, flow->hello_end) && !packet.payload &&
		    !(packet.flags & (FIN | RST))) {
			if (behind(packet.ack, flow->ways[BACKEND_END].acked))
				flow->ways[BACKEND_END].acked = packet.ack;
			return NEXT;
		}
	}
	return translate(skb, flow, number, end, &packet);
}

/* --- out --- */

/* The hello, of which the backend's leg is answerable, or a question for a window in which to send
 * it.  Returns what becomes of the packet.
 */
static __always_inline int let_hello(struct __sk_buff *skb, struct flow *flow,
				     const struct packet *packet)
{
	void *data, *data_end;
	const struct way *client = &flow->ways[CLIENT_END];
	__be32 ack = bpf_htonl(client->acked + client->ack);
	__u32 l4 = packet->l4;
	struct tcp *tcp;
	__be32 *word;
	__u64 sum = 0;

	if (l4 > MAX_OFFSET || bpf_skb_pull_data(skb, l4 + packet->header))
		return DROP;
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	tcp = data + l4;
	if ((void *)(tcp + 1) > data_end)
		return DROP;
	if (behind(bpf_ntohl(tcp->seq) + packet->payload, flow->hello_end))
		return DROP;
	if (bpf_ntohl(tcp->seq) + packet->payload == flow->hello_end)
		flow->hello_sent = 1;
	/* What the socket has taken in passing is one of the network's losses: only what the client
	 * has acknowledged is.
	 */
	sum += (__u32)~tcp->ack;
	sum += ack;
	tcp->ack = ack;
	/* its router has ended: the kernel goes on to send the hello, and the client will end */
	if (tcp->flags & FIN) {
		__be16 was = *((__be16 *)tcp + 6);

		tcp->flags &= ~FIN;
		sum += (__u16)~was;
		sum += *((__be16 *)tcp + 6);
	}
	/* Sent again, it must not look younger than what the client has sent since (PAWS). */
	word = (void *)(tcp + 1);
	if ((void *)(word + 2) <= data_end && *word == bpf_htonl(0x0101080a)) {
		__be32 was = word[1], is = bpf_htonl(flow->stamp);

		word[1] = is;
		sum += (__u32)~was;
		sum += is;
	}
	bpf_l4_csum_replace(skb, l4 + offsetof(struct tcp, check), 0, fold32(sum), 0);
	return NEXT;
}

SEC("tc")
int egress(struct __sk_buff *skb)
{
	struct packet packet;
	struct tuple tuple;
	__u32 number = 0, end = 0;
	struct flow *flow;

	if (skb->priority == EMITTED_MARK) {
		skb->priority = 0;
		return bpf_redirect_neigh(skb->ifindex, NULL, 0, 0);
	}
	/* what has come by a device is not this host's own: translated, or forwarded */
	if (skb->ingress_ifindex || read_packet(skb, &packet))
		return NEXT;
	turn_round(&packet.tuple, &tuple);
	if (packet.flags & SYN)
		note_syn(&tuple, &packet);
	if ((packet.flags & (SYN | ACK)) == SYN) {
		__u32 lacks = skb->priority;

		if ((lacks & 0xffff0000) == LACKS_MARK && lacks & (LACKS_TIMESTAMPS | LACKS_SACK))
			blank_options(skb, packet.l4 + TCP_LEN, packet.header - TCP_LEN, lacks);
		return NEXT;
	}
	flow = find(&tuple, &number, &end);
	if (!flow)
		return NEXT;
	switch (*(volatile __u32 *)&flow->state) {
	case FLOW_OPEN:
	case FLOW_ENDED:
		return DROP;
	case FLOW_HELLO:
		break;
	default:
		return NEXT;
	}
	if (end == BACKEND_END &&
	    (packet.payload || (!flow->hello_sent && !(packet.flags & (FIN | RST)))))
		return let_hello(skb, flow, &packet);
	/* Its router has ended.  Without a hello nothing will ever come of this flow. */
	if (packet.flags & (FIN | RST) && !flow->hello_sent) {
		end_flow(flow, number, FLOW_RESET, EVENT_ABANDONED, end);
		return NEXT;
	}
	return DROP;
}

/* --- install --- */

static __always_inline struct bpf_sock *socket_of(struct __sk_buff *skb, const struct tuple *tuple,
						  bool is_ipv6)
{
	struct bpf_sock_tuple of = {};

	if (is_ipv6) {
		copy_address(of.ipv6.saddr, tuple->from);
		copy_address(of.ipv6.daddr, tuple->to);
		of.ipv6.sport = tuple->from_port;
		of.ipv6.dport = tuple->to_port;
		return bpf_sk_lookup_tcp(skb, &of, sizeof(of.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	of.ipv4.saddr = tuple->from[3];
	of.ipv4.daddr = tuple->to[3];
	of.ipv4.sport = tuple->from_port;
	of.ipv4.dport = tuple->to_port;
	return bpf_sk_lookup_tcp(skb, &of, sizeof(of.ipv4), BPF_F_CURRENT_NETNS, 0);
}

static __always_inline bool is_mapped(const __be32 address[4])
{
	return !address[0] && !address[1] && address[2] == bpf_htonl(0xffff);
}

/* what the sum changes by when the addresses of *was* become those of *is* */
static __always_inline __u32 address_change(const struct tuple *was, const struct tuple *is)
{
	__u64 sum = 0;

	for (int i = 0; i < 4; i++) {
		sum += (__u32)~was->from[i];
		sum += (__u32)~was->to[i];
		sum += is->from[i];
		sum += is->to[i];
	}
	return fold32(sum);
}

static __always_inline __u32 port_change(const struct tuple *was, const struct tuple *is)
{
	__u64 sum = 0;

	sum += (__u16)~was->from_port;
	sum += (__u16)~was->to_port;
	sum += is->from_port;
	sum += is->to_port;
	return fold32(sum);
}

/* Which way the two ends are reached, as they have been heard. */
static __always_inline int find_ways(struct __sk_buff *skb, const struct install *in,
				     struct flow *flow, struct tcp_sock *client,
				     struct tcp_sock *backend)
{
	__u32 *client_seen = bpf_map_lookup_elem(&seen, &in->client);
	__u32 *backend_seen = bpf_map_lookup_elem(&seen, &in->backend);
	__u32 client_device, backend_device, headers;
	int result;

	if (!client_seen || !backend_seen)
		return INSTALL_UNSEEN;
	client_device = *client_seen;
	backend_device = *backend_seen;
	if (client_device == SEVERAL || backend_device == SEVERAL)
		return INSTALL_STACKED;
	if (client_device == backend_device)
		return INSTALL_HAIRPIN;
	result = find_way(skb, &flow->ways[CLIENT_END], client_device, flow->is_ipv6);
	if (!result)
		result = find_way(skb, &flow->ways[BACKEND_END], backend_device, flow->is_ipv6);
	if (result == BPF_FIB_LKUP_RET_FWD_DISABLED)
		return INSTALL_FORWARDING_OFF;
	if (result || flow->ways[CLIENT_END].ifindex != backend_device ||
	    flow->ways[BACKEND_END].ifindex != client_device)
		return INSTALL_ASYMMETRIC;
	/* the client was told what it may send before its backend was known */
	headers = flow->is_ipv6 ? sizeof(struct ipv6) + TCP_LEN : sizeof(struct ipv4) + TCP_LEN;
	if (client->advmss + headers > flow->ways[CLIENT_END].mtu)
		return INSTALL_MTU;
	/* The backend was told by TCP_MAXSEG what the client takes, unless packets were off when it
	 * was dialled.  If it takes less itself, that is what mss_clamp is; if it takes as much, a
	 * client that is no odder sends no more.
	 */
	if (!backend->rx_opt.user_mss || (backend->rx_opt.mss_clamp < backend->rx_opt.user_mss &&
					  backend->rx_opt.mss_clamp < client->advmss))
		return INSTALL_MTU;
	return INSTALL_OK;
}

static __always_inline bool has_more(struct tcp_sock *tcp, __u32 queued)
{
	return *(volatile __u32 *)&tcp->rcv_nxt != tcp->copied_seq + queued ||
	       tcp->out_of_order_queue.rb_node;
}

static __always_inline int make_flow(struct __sk_buff *skb, struct install *in, struct flow *flow,
				     struct tcp_sock *client, struct tcp_sock *backend)
{
	struct way *to_backend = &flow->ways[CLIENT_END], *to_client = &flow->ways[BACKEND_END];
	__u32 up, down, now, numbers[2];
	int client_stamps = BPF_CORE_READ_BITFIELD(client, rx_opt.tstamp_ok);
	int backend_stamps = BPF_CORE_READ_BITFIELD(backend, rx_opt.tstamp_ok);
	int client_sack = BPF_CORE_READ_BITFIELD(client, rx_opt.sack_ok) & 1;
	int backend_sack = BPF_CORE_READ_BITFIELD(backend, rx_opt.sack_ok) & 1;
	int result;

	if (client_stamps != backend_stamps || client_sack != backend_sack)
		return INSTALL_OPTIONS;
	if (bpf_core_field_exists(client->tcp_usec_ts) &&
	    (BPF_CORE_READ_BITFIELD(client, tcp_usec_ts) ||
	     BPF_CORE_READ_BITFIELD(backend, tcp_usec_ts)))
		return INSTALL_OPTIONS;
	/* AccECN counts in bits that only its own two ends understand */
	if ((client->ecn_flags | backend->ecn_flags) & 0x10)
		return INSTALL_ECN;
	if (client->snd_una != client->write_seq)
		return INSTALL_UNSENT;
	if (has_more(backend, 0))
		return INSTALL_BACKEND_SPOKE;
	if (has_more(client, in->hello) || client->bytes_received > MAX_HEAD + MAX_PROXY_HEADER ||
	    backend->write_seq - backend->snd_una > MAX_HEAD)
		return INSTALL_EARLY_DATA;

	up = backend->write_seq - client->copied_seq;
	down = client->write_seq - backend->copied_seq;
	now = bpf_ktime_get_ns() / 1000000;

	turn_round(&in->backend, &to_backend->out);
	to_backend->seq = up;
	to_backend->ack = -down;
	to_backend->tsval = now + backend->tsoffset - client->rx_opt.ts_recent;
	to_backend->scale_from = BPF_CORE_READ_BITFIELD(client, rx_opt.snd_wscale);
	to_backend->scale_to = BPF_CORE_READ_BITFIELD(backend, rx_opt.rcv_wscale);
	to_backend->next = client->copied_seq + in->hello;
	to_backend->bytes = in->hello;
	to_backend->acked = client->snd_una;
	to_backend->offered = client->snd_wnd;

	turn_round(&in->client, &to_client->out);
	to_client->seq = down;
	to_client->ack = -up;
	to_client->tsval = now + client->tsoffset - backend->rx_opt.ts_recent;
	to_client->scale_from = BPF_CORE_READ_BITFIELD(backend, rx_opt.snd_wscale);
	to_client->scale_to = BPF_CORE_READ_BITFIELD(client, rx_opt.rcv_wscale);
	to_client->next = backend->copied_seq;
	to_client->acked = backend->snd_una;
	to_client->offered = backend->snd_wnd;

	to_backend->tsecr = -to_client->tsval;
	to_client->tsecr = -to_backend->tsval;
	to_backend->address_sum = address_change(&in->client, &to_backend->out);
	to_backend->port_sum = port_change(&in->client, &to_backend->out);
	to_client->address_sum = address_change(&in->backend, &to_client->out);
	to_client->port_sum = port_change(&in->backend, &to_client->out);

	flow->serial = in->serial;
	flow->owner = in->owner;
	flow->transparent = in->transparent;
	flow->stamp = now + backend->tsoffset;
	flow->hello_end = backend->write_seq + in->hello;
	flow->hello_sent = !in->hello;
	flow->bleach = (client->ecn_flags ^ backend->ecn_flags) & TCP_ECN_OK;
	to_backend->mtu = to_client->mtu = 65535;
	if (!in->anywhere) {
		result = find_ways(skb, in, flow, client, backend);
		if (result)
			return result;
	}
	to_backend->heard = to_client->heard = seconds();

	if (!leave(flow, FLOW_CLAIMED,
		   backend->snd_una == flow->hello_end ? FLOW_OPEN : FLOW_HELLO))
		return INSTALL_BAD;
	numbers[0] = 2 * in->flow + CLIENT_END;
	numbers[1] = 2 * in->flow + BACKEND_END;
	if (bpf_map_update_elem(&ends, &in->client, &numbers[0], BPF_NOEXIST)) {
		flow->state = FLOW_CLAIMED;
		return INSTALL_TAKEN;
	}
	if (bpf_map_update_elem(&ends, &in->backend, &numbers[1], BPF_NOEXIST)) {
		bpf_map_delete_elem(&ends, &in->client);
		flow->state = FLOW_CLAIMED;
		return INSTALL_TAKEN;
	}
	/* What came after the first look and before the entries is in the socket, and may have been
	 * acknowledged.  What comes later is not: see egress.
	 */
	if (has_more(client, in->hello) || has_more(backend, 0)) {
		bpf_map_delete_elem(&ends, &in->client);
		bpf_map_delete_elem(&ends, &in->backend);
		flow->state = FLOW_CLAIMED;
		return INSTALL_EARLY_DATA;
	}
	return INSTALL_OK;
}

SEC("tc")
int install(struct __sk_buff *skb)
{
	struct bpf_sock *client, *backend = NULL;
	struct tcp_sock *client_tcp, *backend_tcp;
	int result = INSTALL_NOT_ESTABLISHED;
	struct install in;
	struct flow *flow;

	if (bpf_skb_load_bytes(skb, ETH_LEN, &in, sizeof(in)))
		return INSTALL_BAD;
	flow = bpf_map_lookup_elem(&flows, &in.flow);
	if (!flow || flow->state != FLOW_CLAIMED)
		return INSTALL_BAD;
	flow->is_ipv6 = !is_mapped(in.client.from);
	if (flow->is_ipv6 == is_mapped(in.backend.from))
		return INSTALL_FAMILY;
	client = socket_of(skb, &in.client, flow->is_ipv6);
	if (!client)
		return INSTALL_NOT_ESTABLISHED;
	backend = socket_of(skb, &in.backend, flow->is_ipv6);
	if (!backend) {
		bpf_sk_release(client);
		return INSTALL_NOT_ESTABLISHED;
	}
	client_tcp = bpf_skc_to_tcp_sock(client);
	backend_tcp = bpf_skc_to_tcp_sock(backend);
	if (client_tcp && backend_tcp && client->state == ESTABLISHED &&
	    backend->state == ESTABLISHED)
		result = make_flow(skb, &in, flow, client_tcp, backend_tcp);
	bpf_sk_release(client);
	bpf_sk_release(backend);
	return result;
}

/* --- emit --- */

/* Have egress send an IP packet, written by the router behind an empty Ethernet header, to whoever
 * its addresses say.  Only there the kernel asks for a neighbour that it does not know.
 *
 * Returns 0 or -errno.
 */
SEC("tc")
int emit(struct __sk_buff *skb)
{
	skb->priority = EMITTED_MARK;
	return bpf_clone_redirect(skb, skb->ifindex, 0);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
