// SPDX-License-Identifier: Apache-2.0
/* Steps that the loader makes in one call instead of many.  Errors are -errno. */
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <linux/types.h>
#include "abi.h"

#define ATTACH_VERDICT BPF_SK_SKB_STREAM_VERDICT
#define MAX_EVENTS 1024

struct splice {
	int sockets, directions;
	struct counts *counts;
	uint64_t *consumed;
};

/* --- what libbpf and the verifier say while loading: the last 64 KiB --- */

/* each thread's own: two may be told something at once */
static _Thread_local char log_text[65536];
static _Thread_local size_t log_used;

static int log_print(enum libbpf_print_level level, const char *format, va_list args)
{
	char line[16384];
	int n;

	if (level == LIBBPF_DEBUG)
		return 0;
	n = vsnprintf(line, sizeof(line), format, args);
	if (n < 0)
		return 0;
	if ((size_t)n >= sizeof(line))
		n = sizeof(line) - 1;
	if (log_used + n >= sizeof(log_text)) {
		size_t drop = log_used + n + 1 - sizeof(log_text);

		memmove(log_text, log_text + drop, log_used - drop);
		log_used -= drop;
	}
	memcpy(log_text + log_used, line, n);
	log_used += n;
	log_text[log_used] = 0;
	return 0;
}

static void splice_log_start(void)
{
	log_used = 0;
	log_text[0] = 0;
	libbpf_set_print(log_print);
}

static const char *splice_log(void)
{
	return log_text;
}

/* --- counts, shared with the program: read and written without a call --- */

static void *splice_map(int map_fd, size_t size)
{
	void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, map_fd, 0);

	return address == MAP_FAILED ? NULL : address;
}

static void splice_unmap(void *address, size_t size)
{
	munmap(address, size);
}

/* --- the event ring: slots of directions that went slow --- */

static uint32_t splice_events[MAX_EVENTS];
static uint32_t splice_n_events;

static int take_event(void *ctx, void *data, size_t size)
{
	if (size == sizeof(uint32_t))
		memcpy(&splice_events[splice_n_events++], data, size);
	/* a negative answer stops the consumer after this event; the rest stays in the ring */
	return splice_n_events == MAX_EVENTS ? -ENOBUFS : 0;
}

static struct ring_buffer *splice_ring(int map_fd)
{
	return ring_buffer__new(map_fd, take_event, NULL, NULL);
}

/* --- join and leave --- */

/* two sockets, and what has become of them */
struct join {
	int client, backend;
	uint32_t connection;
	int result;
	uint64_t cookies[2];
};

static int splice_leave(struct splice *splice, const uint64_t *cookies, uint32_t n);

/* Enter both sockets, the client first: it is the one that the kernel may refuse.
 *
 * Returns 0; -errno when neither socket is joined; 1 when the backend alone was
 * refused: the client is in the map, and all it sends is passed to user space.
 */
static int join(struct splice *splice, struct join *join, uint32_t limit)
{
	int fds[2] = { join->client, join->backend };
	uint64_t *cookies = join->cookies;
	struct direction dirs[2];
	uint32_t i, n = 2;

	for (i = 0; i < 2; i++) {
		socklen_t size = sizeof(cookies[i]);
		uint32_t slot = 2 * join->connection + i;

		if (getsockopt(fds[i], SOL_SOCKET, SO_COOKIE, &cookies[i], &size))
			return -errno;
		/* no verdict looks at these counts before the directions are there */
		memset(&splice->counts[slot], 0, sizeof(splice->counts[slot]));
		splice->consumed[slot] = 0;
		dirs[i].slot = slot;
		dirs[i].limit = limit;
	}
	dirs[0].peer = cookies[1];
	dirs[1].peer = cookies[0];

	if (bpf_map_update_batch(splice->directions, cookies, dirs, &n, NULL)) {
		int err = errno;

		splice_leave(splice, cookies, 2);
		return -err;
	}
	for (i = 0; i < 2; i++) {
		uint64_t fd = fds[i];

		if (bpf_map_update_elem(splice->sockets, &cookies[i], &fd, BPF_NOEXIST)) {
			int err = errno;

			/* a verdict of the client's may have looked its direction up */
			if (i)
				return 1;
			splice_leave(splice, cookies, 2);
			return -err;
		}
	}
	return 0;
}

/* Join *count* pairs, one after the other. */
static void splice_join_all(struct splice *splice, struct join *joins, int count, uint32_t limit)
{
	for (int i = 0; i < count; i++)
		joins[i].result = join(splice, &joins[i], limit);
}

/* Forget directions, by the cookies of their sources.  Their sockets must be closed: only
 * then is it certain that no verdict runs that has looked one up.
 */
static int splice_leave(struct splice *splice, const uint64_t *cookies, uint32_t n)
{
	uint32_t gone = 0;

	while (gone < n) {
		uint32_t some = n - gone;

		/* stops at a cookie that is not there, after *some* that were */
		if (!bpf_map_delete_batch(splice->directions, cookies + gone, &some, NULL))
			return 0;
		if (errno != ENOENT)
			return -errno;
		gone += some + 1;
	}
	return 0;
}
