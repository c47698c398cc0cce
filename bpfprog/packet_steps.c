// SPDX-License-Identifier: Apache-2.0
/* Steps of the packet hand-off that would be many calls from Python.  Errors are -errno. */
#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include "packet.h"

/* enum bpf_attach_type, which an older libbpf does not name */
#define TCX_INGRESS 46
#define TCX_EGRESS 47

/* places looked at for a free one; a table as full as that has none */
#define MAX_PROBES 1024

/* of the filters of all routers, in the one qdisc that they share with others' (tc-bpf(8)) */
#define TC_PRIORITY 0x5352

enum clsact { CLSACT_ATTACH, CLSACT_DETACH, CLSACT_FIND };

struct packet {
	int install, emit, ends, notes, rings;
	struct flow *flows;
	uint32_t owner;
	uint32_t cursor;
};

/* two sockets to make a flow of, and what has become of that */
struct pair {
	uint64_t serial;
	int client, backend;
	bool foreign;

	int result; /* enum install_result, or -errno */
	uint32_t number;
	bool sent; /* what waited in the client's socket */
	bool open; /* the backend has acknowledged that; if not, EVENT_ACKED will tell */
	char pad[2];
};

/* --- devices --- */

/* Where the kernel has no TCX: attach a program as the filter *handle*, take that off, or look for
 * it.
 */
static int packet_clsact(enum clsact what, int ifindex, bool egress, uint32_t handle, int prog_fd)
{
	DECLARE_LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex,
			    .attach_point = egress ? BPF_TC_EGRESS : BPF_TC_INGRESS);
	DECLARE_LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = TC_PRIORITY);
	int err;

	if (what == CLSACT_FIND)
		return bpf_tc_query(&hook, &opts);
	if (what == CLSACT_DETACH)
		return bpf_tc_detach(&hook, &opts);
	err = bpf_tc_hook_create(&hook);
	if (err && err != -EEXIST)
		return err;
	opts.prog_fd = prog_fd;
	opts.flags = BPF_TC_F_REPLACE;
	return bpf_tc_attach(&hook, &opts);
}

/* The device that a link is attached to, 0 where that is gone. */
static int packet_link_device(int link_fd)
{
	/* struct bpf_link_info, of which an older header has no TCX part */
	uint32_t info[32] = {};
	uint32_t size = sizeof(info);

	if (bpf_obj_get_info_by_fd(link_fd, info, &size))
		return -errno;
	/* type, id, prog_id, padding; then tcx.ifindex */
	return info[4];
}

/* --- what another version has left --- */

/* How many flows are under way in a pinned map; no more is known of it than packet.h promises. */
static int packet_under_way(const char *pin)
{
	struct bpf_map_info info = {};
	uint32_t size = sizeof(info);
	int fd = bpf_obj_get(pin);
	int found = 0;
	size_t step;
	char *values;

	if (fd < 0)
		return fd;
	if (bpf_obj_get_info_by_fd(fd, &info, &size) || info.type != BPF_MAP_TYPE_ARRAY) {
		close(fd);
		return -EINVAL;
	}
	/* as the kernel lays the values of an array out */
	step = (info.value_size + 7UL) & ~7UL;
	values = mmap(NULL, step * info.max_entries, PROT_READ, MAP_SHARED, fd, 0);
	if (values == MAP_FAILED)
		found = -errno;
	close(fd);
	for (size_t i = 0; found >= 0 && i < info.max_entries; i++) {
		uint32_t state = __atomic_load_n((uint32_t *)(values + i * step), __ATOMIC_RELAXED);

		found += state == FLOW_HELLO || state == FLOW_OPEN;
	}
	if (found >= 0)
		munmap(values, step * info.max_entries);
	return found;
}

/* --- events --- */

#define MAX_FLOW_EVENTS 1024

static struct flow_event packet_events[MAX_FLOW_EVENTS];
static uint32_t packet_n_events;

static int take_flow_event(void *ctx, void *data, size_t size)
{
	if (size == sizeof(*packet_events))
		memcpy(&packet_events[packet_n_events++], data, size);
	return packet_n_events == MAX_FLOW_EVENTS ? -ENOBUFS : 0;
}

/* Make the ring of this owner. */
static struct ring_buffer *packet_ring(struct packet *packet)
{
	int fd = bpf_map_create(BPF_MAP_TYPE_RINGBUF, "flow_events", 0, 0, FLOW_EVENTS_BYTES, NULL);
	struct ring_buffer *ring = NULL;

	if (fd < 0)
		return NULL;
	if (!bpf_map_update_elem(packet->rings, &packet->owner, &fd, BPF_ANY))
		ring = ring_buffer__new(fd, take_flow_event, NULL, NULL);
	close(fd);
	return ring;
}

/* --- install --- */

static void map_address(const struct sockaddr_storage *from, __be32 address[4], __be16 *port)
{
	if (from->ss_family == AF_INET) {
		const struct sockaddr_in *in = (const struct sockaddr_in *)from;

		address[0] = address[1] = 0;
		address[2] = htonl(0xffff);
		address[3] = in->sin_addr.s_addr;
		*port = in->sin_port;
	} else {
		const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)from;

		memcpy(address, &in6->sin6_addr, sizeof(in6->sin6_addr));
		*port = in6->sin6_port;
	}
}

/* the addresses of packets that come to *fd* */
static int read_tuple(int fd, struct tuple *tuple)
{
	struct sockaddr_storage address;
	socklen_t size = sizeof(address);

	if (getpeername(fd, (struct sockaddr *)&address, &size))
		return -errno;
	map_address(&address, tuple->from, &tuple->from_port);
	size = sizeof(address);
	if (getsockname(fd, (struct sockaddr *)&address, &size))
		return -errno;
	map_address(&address, tuple->to, &tuple->to_port);
	return 0;
}

static bool leave_state(struct flow *flow, uint32_t from, uint32_t to)
{
	return __sync_bool_compare_and_swap(&flow->state, from, to);
}

static int64_t claim(struct packet *packet)
{
	for (int i = 0; i < MAX_PROBES; i++) {
		uint32_t number = packet->cursor++ % MAX_FLOWS;

		if (packet->flows[number].state == FLOW_FREE &&
		    leave_state(&packet->flows[number], FLOW_FREE, FLOW_CLAIMED)) {
			packet->flows[number].owner = packet->owner;
			return number;
		}
	}
	return -1;
}

static void give_back(struct flow *flow)
{
	memset((char *)flow + sizeof(flow->state), 0, sizeof(*flow) - sizeof(flow->state));
	/* nobody's, not even of owner 0, until whoever claims it has said so */
	flow->owner = MAX_OWNERS;
	__atomic_store_n(&flow->state, FLOW_FREE, __ATOMIC_RELEASE);
}

/* Run a program over *data*, *size* bytes with room for an Ethernet header first.
 *
 * Returns what the program does, or -errno.
 */
static int packet_run(int prog_fd, void *data, uint32_t size, void *out, uint32_t *out_size)
{
	DECLARE_LIBBPF_OPTS(bpf_test_run_opts, opts, .data_in = data, .data_size_in = size,
			    .data_out = out, .data_size_out = out_size ? *out_size : 0,
			    .repeat = 1);

	if (bpf_prog_test_run_opts(prog_fd, &opts))
		return -errno;
	if (out_size)
		*out_size = opts.data_size_out;
	return opts.retval;
}

/* Whether a flow's hello is acknowledged; if not, EVENT_ACKED will tell. */
static bool packet_acknowledged(struct packet *packet, uint32_t number)
{
	struct flow *flow = &packet->flows[number];

	if (__atomic_load_n(&flow->state, __ATOMIC_ACQUIRE) != FLOW_HELLO)
		return true;
	/* the program leaves the state, then looks whether that is awaited: one of us sees the
	 * other */
	__atomic_store_n(&flow->awaited, 1, __ATOMIC_SEQ_CST);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return __atomic_load_n(&flow->state, __ATOMIC_ACQUIRE) != FLOW_HELLO;
}

/* Make a flow of two sockets, and send the backend what waits in the client's, which leaves it
 * there: that socket only goes.
 *
 * Returns an enum install_result, or -errno.
 */
static int install(struct packet *packet, struct pair *pair, bool anywhere)
{
	static char head[MAX_HEAD + 1];
	struct {
		unsigned char ethernet[ETH_HLEN];
		struct install in;
	} __attribute__((packed)) data = {};
	struct install in = {
		.owner = packet->owner,
		.serial = pair->serial,
		.anywhere = anywhere,
	};
	ssize_t size = recv(pair->client, head, sizeof(head), MSG_PEEK | MSG_DONTWAIT);
	int64_t claimed;
	int result;

	if (size < 0 && errno != EAGAIN)
		return -errno;
	if (size > MAX_HEAD)
		return INSTALL_EARLY_DATA;
	size = size < 0 ? 0 : size;
	in.hello = size;
	result = read_tuple(pair->client, &in.client);
	if (!result)
		result = read_tuple(pair->backend, &in.backend);
	if (result)
		return result;
	in.transparent =
		pair->foreign || !memcmp(in.backend.to, in.client.from, sizeof(in.client.from));
	claimed = claim(packet);
	if (claimed < 0)
		return INSTALL_FULL;
	in.flow = pair->number = claimed;
	data.in = in;
	result = packet_run(packet->install, &data, sizeof(data), NULL, NULL);
	if (result) {
		give_back(&packet->flows[claimed]);
		return result;
	}
	/* what fails now can not be undone: the client's packets may have gone on already */
	pair->sent = !size || send(pair->backend, head, size, MSG_NOSIGNAL) == size;
	pair->open = pair->sent && packet_acknowledged(packet, claimed);
	return 0;
}

/* Make flows of *count* pairs, one after the other. */
static void packet_install_all(struct packet *packet, struct pair *pairs, int count, bool anywhere)
{
	for (int i = 0; i < count; i++)
		pairs[i].result = install(packet, &pairs[i], anywhere);
}

/* Have two sockets go without a word when they are closed (tcp_close). */
static int packet_silence(int one, int other)
{
	int on = TCP_REPAIR_ON;

	if (setsockopt(one, IPPROTO_TCP, TCP_REPAIR, &on, sizeof(on)) ||
	    setsockopt(other, IPPROTO_TCP, TCP_REPAIR, &on, sizeof(on)))
		return -errno;
	return 0;
}

/* The next sequence numbers that a silenced socket would send and receive. */
static int packet_sequence(int fd, uint32_t numbers[2])
{
	const int queues[2] = { TCP_SEND_QUEUE, TCP_RECV_QUEUE };

	for (int i = 0; i < 2; i++) {
		socklen_t size = sizeof(numbers[i]);

		if (setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &queues[i], sizeof(queues[i])) ||
		    getsockopt(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &numbers[i], &size))
			return -errno;
	}
	return 0;
}

/* Send an IP packet, behind an empty Ethernet header, by the device *ifindex*. */
static int packet_emit(struct packet *packet, void *data, uint32_t size, uint32_t ifindex)
{
	struct __sk_buff context = { .ifindex = ifindex };
	DECLARE_LIBBPF_OPTS(bpf_test_run_opts, opts, .data_in = data, .data_size_in = size,
			    .ctx_in = &context, .ctx_size_in = sizeof(context), .repeat = 1);

	/* a trial's way leads nowhere; the kernel would take 0 for the loopback device */
	if (!ifindex)
		return -ENODEV;
	if (bpf_prog_test_run_opts(packet->emit, &opts))
		return -errno;
	return opts.retval;
}

/* --- ends --- */

/* Stop translating; true unless that was so already. */
static bool packet_end(struct packet *packet, uint32_t number)
{
	struct flow *flow = &packet->flows[number];

	/* in the order that they follow each other: none is left between two tries */
	return leave_state(flow, FLOW_HELLO, FLOW_RESET) ||
	       leave_state(flow, FLOW_OPEN, FLOW_RESET) ||
	       leave_state(flow, FLOW_ENDED, FLOW_RESET);
}

static void turn_round(const struct tuple *tuple, struct tuple *other)
{
	memcpy(other->from, tuple->to, sizeof(other->from));
	memcpy(other->to, tuple->from, sizeof(other->to));
	other->from_port = tuple->to_port;
	other->to_port = tuple->from_port;
}

/* Free a flow that has been over for long enough, or has never begun; one that is not the same any
 * more, or is under way, is left alone.
 *
 * Returns false for one whose addresses a SYN has taken, this very instant perhaps: next time.
 */
static bool packet_reap(struct packet *packet, uint32_t number, uint64_t serial)
{
	struct flow *flow = &packet->flows[number];
	uint32_t state = flow->state;

	if (flow->serial != serial || state == FLOW_FREE || state == FLOW_HELLO ||
	    state == FLOW_OPEN)
		return true;
	if (leave_state(flow, FLOW_FORGOTTEN, FLOW_REAPED))
		return false;
	/* Who is first, this or a new connection's SYN, deletes the addresses.  Of what a router
	 * has ended at they may be another's by now.
	 */
	if (leave_state(flow, FLOW_ENDED, FLOW_REAPED) ||
	    leave_state(flow, FLOW_RESET, FLOW_REAPED) || state == FLOW_REAPED) {
		for (int i = 0; i < 2; i++) {
			struct tuple end;
			uint32_t found = number << 1;

			turn_round(&flow->ways[i].out, &end);
			if (state == FLOW_REAPED && bpf_map_lookup_elem(packet->ends, &end, &found))
				continue;
			if (found >> 1 == number)
				bpf_map_delete_elem(packet->ends, &end);
		}
	}
	if (flow->noted)
		bpf_map_delete_elem(packet->notes, &number);
	give_back(flow);
	return true;
}

/* List the flows that are somebody's.  Returns how many. */
static uint32_t packet_list(struct packet *packet, uint32_t *numbers, uint32_t room)
{
	uint32_t found = 0;

	for (uint32_t number = 0; number < MAX_FLOWS && found < room; number++)
		if (packet->flows[number].state != FLOW_FREE)
			numbers[found++] = number;
	return found;
}

/* List the flows of which nobody has heard since *before*.  Returns how many. */
static uint32_t packet_idle(struct packet *packet, uint32_t before, uint32_t *numbers,
			    uint32_t room)
{
	uint32_t found = 0;

	for (uint32_t number = 0; number < MAX_FLOWS && found < room; number++) {
		struct flow *flow = &packet->flows[number];

		if ((flow->state == FLOW_OPEN || flow->state == FLOW_HELLO) &&
		    flow->owner == packet->owner && flow->ways[0].heard < before &&
		    flow->ways[1].heard < before)
			numbers[found++] = number;
	}
	return found;
}

/* --- notes --- */

static int packet_note(struct packet *packet, uint32_t number, const char *text, uint32_t size)
{
	struct note note = {};

	memcpy(note.text, text, size < sizeof(note.text) ? size : sizeof(note.text));
	packet->flows[number].noted = 1;
	return bpf_map_update_elem(packet->notes, &number, &note, BPF_ANY) ? -errno : 0;
}

static int packet_read_note(struct packet *packet, uint32_t number, struct note *note)
{
	return bpf_map_lookup_elem(packet->notes, &number, note) ? -errno : 0;
}
