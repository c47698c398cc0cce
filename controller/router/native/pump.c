// SPDX-License-Identifier: Apache-2.0
/* Move bytes through user space: all of them for the relay, and what the kernel passed to us for
 * a joined direction whose destination lags.
 */

enum {
	CHUNK = 1024 * 1024, /* one read: fewer, larger steps are what makes a copy cheap */
	BY_HAND = 16384, /* a hello with what follows it at once; any fresh socket takes as much */
};

static unsigned char chunk[CHUNK];

/* what was read and could not be written yet: at most a chunk, and only while that is so */
struct pipe {
	unsigned char *pending;
	size_t start, size;
};

struct pipe *pipe_new(void)
{
	return calloc(1, sizeof(struct pipe));
}

void pipe_free(struct pipe *pipe)
{
	if (pipe)
		free(pipe->pending);
	free(pipe);
}

/* Put *data* into an empty pipe; false when there is no memory for it. */
static bool pipe_fill(struct pipe *pipe, const void *data, size_t size)
{
	pipe->pending = malloc(size);
	if (!pipe->pending)
		return false;
	memcpy(pipe->pending, data, size);
	pipe->start = 0;
	pipe->size = size;
	return true;
}

/* Write what is pending.
 *
 * Returns how much went, and in *status* MOVE_IDLE when nothing is left.
 */
static size_t pipe_flush(struct pipe *pipe, int to, enum move *status)
{
	ssize_t sent = send(to, pipe->pending + pipe->start, pipe->size, MSG_NOSIGNAL);

	if (sent < 0) {
		*status = errno == EAGAIN ? MOVE_FULL : MOVE_BROKEN;
		return 0;
	}
	pipe->start += sent;
	pipe->size -= sent;
	*status = pipe->size ? MOVE_FULL : MOVE_IDLE;
	if (!pipe->size) {
		free(pipe->pending);
		pipe->pending = NULL;
	}
	return sent;
}

/* Read a chunk and write it; keep what does not go.
 *
 * Returns how much was written, and in *status* MOVE_MORE when all went.
 */
static size_t pipe_step(struct pipe *pipe, int from, int to, enum move *status)
{
	ssize_t size, sent;

	if (pipe->size) {
		size_t went = pipe_flush(pipe, to, status);

		if (*status == MOVE_IDLE)
			*status = MOVE_MORE;
		return went;
	}
	size = recv(from, chunk, CHUNK, 0);
	if (size <= 0) {
		*status = !size ? MOVE_END : errno == EAGAIN ? MOVE_IDLE : MOVE_FAILED;
		return 0;
	}
	sent = send(to, chunk, size, MSG_NOSIGNAL);
	if (sent < 0 && errno != EAGAIN) {
		*status = MOVE_BROKEN;
		return 0;
	}
	if (sent < 0)
		sent = 0;
	*status = MOVE_MORE;
	if (sent < size) {
		*status = pipe_fill(pipe, chunk + sent, size - sent) ? MOVE_FULL : MOVE_BROKEN;
	}
	return sent;
}

/* Move bytes until one side makes us wait or *budget* is spent, for the others' sake. */
enum move relay_pump(struct pipe *pipe, int from, int to, size_t budget, uint64_t *moved)
{
	enum move status = MOVE_MORE;
	size_t spent = 0;

	while (status == MOVE_MORE && spent < budget) {
		size_t went = pipe_step(pipe, from, to, &status);

		*moved += went;
		spent += went;
	}
	return status;
}

/* Write to *to* what *from* has received, and only then take it; what is not written stays, and
 * so does more than a hello.
 *
 * Returns how much went, or -errno when *to* takes nothing, ever.
 */
static int send_on(int from, int to)
{
	ssize_t size = recv(from, chunk, BY_HAND + 1, MSG_PEEK), sent;

	if (size <= 0 || size > BY_HAND)
		return 0;
	sent = send(to, chunk, size, MSG_NOSIGNAL);
	if (sent < 0)
		return errno == EAGAIN ? 0 : -errno;
	drop_bytes(from, sent);
	return sent;
}

/* The same for *count* pairs of sockets, from the first of each to the second. */
void send_on_all(const int *pairs, int count, int *sent)
{
	for (int i = 0; i < count; i++)
		sent[i] = send_on(pairs[2 * i], pairs[2 * i + 1]);
}

/* --- a joined direction --- */

static int read_info(int fd, struct tcp_info *info)
{
	socklen_t size = sizeof(*info);

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &size))
		return -errno;
	return 0;
}

/* Whether TCP has accepted *bytes* of what was written to *fd*, from its first sequence number
 * on: what is acknowledged, and what is not yet.  The two are of one moment if the first did not
 * change meanwhile; acknowledgements that come too fast to tell are no.  (What it has sent is no
 * measure: a segment that is dropped on this host is counted each time.)
 */
static bool accepted(int fd, uint64_t bytes)
{
	struct tcp_info before, after;
	int unacknowledged;

	for (int i = 0; i < 4; i++) {
		if (read_info(fd, &before))
			return false;
		/* mostly so when the source has ended */
		if (before.tcpi_bytes_acked == bytes)
			return true;
		if (ioctl(fd, SIOCOUTQ, &unacknowledged) || read_info(fd, &after))
			return false;
		if (before.tcpi_bytes_acked == after.tcpi_bytes_acked)
			return after.tcpi_bytes_acked + unacknowledged == bytes;
	}
	return false;
}

/* Bytes that were moved on, by the kernel or by us. */
uint64_t moved(const struct joined *joined, uint32_t direction)
{
	return joined->counts[direction].redirected + joined->consumed[direction];
}

static bool backlog_empty(int to, const struct joined *joined, uint32_t direction, uint64_t given)
{
	return accepted(to, given + moved(joined, direction));
}

bool is_slow(const struct joined *joined, uint32_t direction)
{
	return __atomic_load_n(&joined->counts[direction].passed, __ATOMIC_SEQ_CST) !=
	       joined->consumed[direction];
}

/* Move what the kernel passed to us, once all that it redirected before is written: not before,
 * or we would overtake it.  *consumed* follows each write, so that
 * written == redirected + consumed holds at each of our turns.
 *
 * Returns MOVE_IDLE when the kernel carries the direction again, MOVE_QUEUED when its backlog is
 * not written yet, MOVE_FULL when the destination takes no more.
 */
enum move slow_pump(struct pipe *pipe, int from, int to, const struct joined *joined,
		    uint32_t direction, uint64_t given, size_t budget)
{
	uint64_t *consumed = joined->consumed + direction;
	enum move status = MOVE_MORE;
	size_t spent = 0;

	while (status == MOVE_MORE && spent < budget) {
		size_t went;

		if (!is_slow(joined, direction))
			return MOVE_IDLE;
		if (!backlog_empty(to, joined, direction, given))
			return MOVE_QUEUED;
		went = pipe_step(pipe, from, to, &status);
		/* see pass() in splice.bpf.c for the barrier that meets these */
		__atomic_store_n(consumed, *consumed + went, __ATOMIC_SEQ_CST);
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		spent += went;
	}
	/* counted a moment before it is queued for us: look again */
	if (status == MOVE_IDLE || status == MOVE_END)
		status = is_slow(joined, direction) ? MOVE_QUEUED : MOVE_IDLE;
	return status;
}

/* Whether all that *from* received before its FIN has been written to *to*.
 *
 * The FIN is announced before the verdict has seen the bytes that came with it.  TCP_INFO takes
 * the socket's lock, so it waits for that verdict, and bytes_received proves it: it counts
 * every byte in order and, for one, the FIN (tcp_rcv_nxt_update).
 */
bool drained(int from, int to, const struct joined *joined, uint32_t direction, uint64_t taken,
	     uint64_t given)
{
	const struct counts *counts = joined->counts + direction;
	struct tcp_info info;

	if (read_info(from, &info))
		return false;
	return info.tcpi_bytes_received == taken + counts->redirected + counts->passed + 1 &&
	       !is_slow(joined, direction) && backlog_empty(to, joined, direction, given);
}
