// SPDX-License-Identifier: Apache-2.0
/*
 * Both ends of the benchmark's traffic, one process each:
 *
 *   traffic backend ADDR PORT HELLO GREETING PLAY SECONDS
 *   traffic client  ADDR PORT HELLO GREETING PLAY SECONDS NUMBER
 *
 * The client opens NUMBER connections and sends the exact bytes of the file HELLO on each;
 * the backend answers GREETING.  Then they do as PLAY says:
 *
 *   fin, reset   the client closes so, and opens the next one
 *   paced        as fin, but NUMBER new ones a second, and the time to the greeting is kept
 *   down, up     a pattern streams that way for SECONDS
 *   trips        64 bytes go there and back, one message at a time
 *   hold         nothing, until the client's stdin ends
 *   stall        as hold, while the backend streams as much as fits
 *
 * Both check every greeting and message, and a stream at both ends of each read, so that lost,
 * doubled or strange bytes are errors.
 *
 * Each prints one line of JSON at its end.  The backend ends when its stdin does, and every
 * loop is bounded by time, the client's by a count of errors as well.
 */
#define _GNU_SOURCE
#include "ends.h"

enum {
	HELLO_MAX = 65536,
	PATTERN = 1 << 20, /* a shift by a multiple of it shows in the total only */
	PROBE = 64, /* bytes compared at each end of a read */
	TLS_ALERT = 21, /* RFC 8446, 5.1: a record of the header's five bytes and these two, 6 */
	ALERT_SIZE = 7,
	MESSAGE = 64,
	READ = 1 << 18,
	TIMES_MAX = 1 << 20,
	HELD_S = 600,
};

static const char *const plays[] = { "fin",   "reset", "paced", "down", "up",
				     "trips", "hold",  "stall", NULL };
enum play { FIN, RESET, PACED, DOWN, UP, TRIPS, HOLD, STALL };

struct conn {
	int fd;
	enum { HELLO, GREETING, TALK, DONE } state;
	size_t got; /* of what the state waits for */
	long long in, out; /* of the pattern */
	double since;
};

static enum play play;
static char hello[HELLO_MAX], pattern[PATTERN + PROBE], buffer[READ];
static size_t hello_len;
static double seconds, start, begun, end;
static long long total_in, total_out;

/* --- the pattern: 1: go on; 0: would block; -1: the end or an error --------- */

static int same_pattern(const char *data, size_t n, long long at)
{
	size_t probe = n < PROBE ? n : PROBE, last = n - probe;

	return !memcmp(data, pattern + at % PATTERN, probe) &&
	       !memcmp(data + last, pattern + (at + last) % PATTERN, probe);
}

static int write_pattern(struct conn *c)
{
	size_t at = c->out % PATTERN;
	ssize_t n = send(c->fd, pattern + at, PATTERN - at, MSG_NOSIGNAL);

	if (n < 0 && errno == EAGAIN)
		return 0;
	if (n < 0) {
		if (play != STALL) /* which ends by closing on a full socket */
			error("send after %lld: %s", c->out, strerror(errno));
		return -1;
	}
	c->out += n;
	total_out += n;
	return 1;
}

static int read_pattern(struct conn *c)
{
	ssize_t n = recv(c->fd, buffer, sizeof(buffer), 0);

	if (n < 0 && errno == EAGAIN)
		return 0;
	if (n < 0)
		error("recv after %lld: %s", c->in, strerror(errno));
	if (n <= 0)
		return -1;
	if (!same_pattern(buffer, n, c->in))
		error("strange bytes in the %zd after %lld", n, c->in);
	c->in += n;
	total_in += n;
	return 1;
}

/* --- backend ------------------------------------------------------------- */

static long accepted, ended, serving;

static void drop(struct conn *c)
{
	close(c->fd);
	free(c);
	serving--;
}

/* The client's end: every play has one right time for it. */
static void at_end(struct conn *c, ssize_t n)
{
	int may_reset = play == RESET || play == STALL;

	if (n < 0 && !(errno == ECONNRESET && may_reset))
		error("backend: recv: %s", strerror(errno));
	else if (c->state == HELLO)
		error("backend: end after %zu of %zu bytes", c->got, hello_len);
	else
		ended++;
	drop(c);
}

/* 1: go on; 0: wait for an event, if it is still there. */
static int serve_hello(struct conn *c)
{
	ssize_t n = recv(c->fd, buffer, sizeof(buffer), 0);

	if (n < 0 && errno == EAGAIN)
		return 0;
	if (n <= 0) {
		at_end(c, n);
		return 0;
	}
	if (c->got + n > hello_len || memcmp(buffer, hello + c->got, n)) {
		error("backend: strange bytes at %zu", c->got);
		drop(c);
		return 0;
	}
	c->got += n;
	if (c->got < hello_len)
		return 1;
	if (send(c->fd, greeting, greeting_len, MSG_NOSIGNAL) != (ssize_t)greeting_len) {
		error("backend: greeting: %s", strerror(errno));
		drop(c);
		return 0;
	}
	c->state = TALK;
	c->since = now();
	return play == DOWN || play == STALL; /* else the next event tells of more */
}

static void serve_upload(struct conn *c)
{
	int more = 1;

	while (more > 0)
		more = read_pattern(c);
	if (more < 0) {
		ended += !errors;
		drop(c); /* its FIN tells the client that all of it came */
	}
}

static void serve_download(struct conn *c)
{
	while (c->state == TALK) {
		int over = play == DOWN && now() > c->since + seconds;
		int more = over ? -1 : write_pattern(c);

		if (!more)
			break;
		if (more < 0) {
			shutdown(c->fd, SHUT_WR);
			c->state = DONE;
		}
	}
}

static void serve(struct conn *c)
{
	ssize_t n;

	while (c->state == HELLO)
		if (!serve_hello(c))
			return;
	if (play == UP) {
		serve_upload(c);
		return;
	}
	if (play == DOWN || play == STALL)
		serve_download(c);
	while ((n = recv(c->fd, buffer, sizeof(buffer), 0)) > 0) {
		if (play != TRIPS) {
			error("backend: strange bytes after the hello");
			drop(c);
			return;
		}
		if (send(c->fd, buffer, n, MSG_NOSIGNAL) != n)
			error("backend: echo: %s", strerror(errno));
		if (n <= MESSAGE)
			return; /* the next event tells of more */
	}
	if (!n || errno != EAGAIN)
		at_end(c, n);
}

static void backend(void)
{
	struct epoll_event events[EVENTS];
	int epoll = epoll_create1(0), fd = listener(), new;
	double deadline = 0;

	/* Two addresses that no connection can have. */
	watch(epoll, fd, EPOLLIN, &fd);
	watch(epoll, 0, EPOLLIN, NULL);
	say("ready");

	while (!deadline || (serving && now() < deadline)) {
		int n = epoll_wait(epoll, events, EVENTS, 100);

		for (int i = 0; i < n; i++) {
			struct conn *c = events[i].data.ptr;

			if (!c) {
				epoll_ctl(epoll, EPOLL_CTL_DEL, 0, NULL);
				deadline = now() + GRACE_S;
			} else if ((void *)c != &fd) {
				serve(c);
			} else {
				while ((new = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					c = calloc(1, sizeof(*c));
					c->fd = new;
					accepted++;
					serving++;
					watch(epoll, new,
					      EPOLLIN | EPOLLET |
						      (play == DOWN || play == STALL ? EPOLLOUT
										     : 0),
					      c);
				}
			}
		}
	}
	if (serving)
		error("backend: %ld connections never ended", serving);
	printf("{\"accepted\": %ld, \"ended\": %ld, \"in\": %lld, \"out\": %lld, ", accepted, ended,
	       total_in, total_out);
	print_errors();
}

/* --- client -------------------------------------------------------------- */

static int number, epoll, live, greeted;
static struct conn conns[CONNS_MAX];
static long done, count;
static double times[TIMES_MAX];
static long timed;

static void dial(struct conn *c)
{
	*c = (struct conn){ .fd = dialled(), .since = now() };
	watch(epoll, c->fd, EPOLLIN | EPOLLOUT | EPOLLET, c);
}

static void finish(struct conn *c, int well)
{
	struct linger now_or_never = { .l_onoff = 1 };

	if (play == RESET)
		setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now_or_never, sizeof(now_or_never));
	close(c->fd); /* where everything was read, this sends a FIN */
	done += well;
	c->fd = 0; /* which is stdin, and so nobody's */
	if ((play == FIN || play == RESET) && now() < end && errors < ERRORS_MAX)
		dial(c);
	else
		live--;
}

static int say_hello(struct conn *c)
{
	ssize_t n = send(c->fd, hello, hello_len, MSG_NOSIGNAL);

	if (n < 0 && errno == EAGAIN)
		return 0; /* still connecting */
	if (n != (ssize_t)hello_len) {
		error("client: connect or send: %s", strerror(errno));
		return -1;
	}
	c->state = GREETING;
	return 0; /* the next event tells of the answer */
}

static int hear_greeting(struct conn *c)
{
	ssize_t n = recv(c->fd, buffer, greeting_len - c->got, 0);

	if (n < 0 && errno == EAGAIN)
		return 0;
	if (n <= 0) {
		error("client: %s after %zu bytes", n ? strerror(errno) : "end", c->got);
		return -1;
	}
	if (memcmp(buffer, greeting + c->got, n)) {
		if (n == ALERT_SIZE && *buffer == TLS_ALERT)
			error("client: alert %d", (unsigned char)buffer[ALERT_SIZE - 1]);
		else
			error("client: not the greeting of the right backend");
		return -1;
	}
	c->got += n;
	if (c->got < greeting_len)
		return 1;
	c->state = TALK;
	c->got = 0;
	if (!greeted++)
		begun = now(); /* dialling is no part of streams and trips */
	if (play == PACED && timed < TIMES_MAX)
		times[timed++] = now() - c->since;
	return 1;
}

static int send_message(struct conn *c)
{
	if (send(c->fd, pattern + c->out % PATTERN, MESSAGE, MSG_NOSIGNAL) == MESSAGE)
		return 1;
	error("client: send: %s", strerror(errno));
	return -1;
}

/* One message there and back after the other. */
static int trip(struct conn *c)
{
	ssize_t n = 0;

	if (!c->out) {
		c->out = MESSAGE;
		return send_message(c) < 0 ? -1 : 0;
	}
	n = recv(c->fd, buffer, MESSAGE - c->got, 0);
	if (n < 0 && errno == EAGAIN)
		return 0;
	if (n <= 0 || memcmp(buffer, pattern + c->out % PATTERN + c->got, n)) {
		error("client: %s in a round trip", n < 0 ? strerror(errno) : "wrong bytes");
		return -1;
	}
	c->got += n;
	if (c->got < MESSAGE)
		return 1;
	c->got = 0;
	count++;
	c->out += MESSAGE;
	if (now() >= end)
		return 2;
	return send_message(c) < 0 ? -1 : 0;
}

/* 2: well done; 1: go on; 0: wait for an event; -1: an error. */
static int talk(struct conn *c)
{
	int more;

	switch (play) {
	case FIN:
	case RESET:
	case PACED:
		count += now() < end;
		return 2;
	case DOWN:
		more = read_pattern(c);
		return more < 0 && !errors ? 2 : more;
	case UP:
		if (c->state == TALK && now() >= end) {
			shutdown(c->fd, SHUT_WR);
			c->state = DONE;
		}
		if (c->state == TALK)
			return write_pattern(c);
		return recv(c->fd, buffer, sizeof(buffer), 0) ? 0 : 2;
	case TRIPS:
		return trip(c);
	default:
		return 0;
	}
}

static void on_event(struct conn *c)
{
	int more = 1;

	while (more == 1)
		more = c->state == HELLO      ? say_hello(c)
		       : c->state == GREETING ? hear_greeting(c)
					      : talk(c);
	if (more)
		finish(c, more > 0);
}

static void wait_for(double until)
{
	struct epoll_event events[EVENTS];
	double left = until - now();
	struct timespec patience = { .tv_nsec = left <= 0 ? 0 : left < 0.1 ? left * 1e9 : 1e8 };
	int n = epoll_pwait2(epoll, events, EVENTS, &patience, NULL);

	for (int i = 0; i < n; i++)
		if (events[i].data.ptr)
			on_event(events[i].data.ptr);
		else
			end = 0; /* stdin has ended */
}

static void come_to_an_end(void)
{
	while (live && now() < end + GRACE_S)
		wait_for(end + GRACE_S);
}

static void keep_up(void)
{
	while (live < number)
		dial(&conns[live++]);
	come_to_an_end();
}

static struct conn *spare(void)
{
	for (struct conn *c = conns; c < conns + CONNS_MAX; c++)
		if (!c->fd)
			return c;
	return NULL;
}

/* Open loop: the next one is due whether or not the last one was answered. */
static void keep_pace(void)
{
	for (long i = 0; i < number * seconds && errors < ERRORS_MAX; i++) {
		double due = start + (double)i / number;
		struct conn *c = spare();

		if (!c) {
			error("client: %d connections wait for an answer", live);
			break;
		}
		do
			wait_for(due);
		while (now() < due);
		dial(c);
		live++;
	}
	come_to_an_end();
}

static void hold(void)
{
	/* a few at a time: a queue that overflows would cost seconds */
	while (greeted < number && now() < start + 4 * GRACE_S && errors < ERRORS_MAX) {
		for (; live < number && live < greeted + 64; live++)
			dial(spare());
		wait_for(now() + 0.1);
	}
	if (greeted < number)
		error("client: only %d of %d connections opened", greeted, number);
	watch(epoll, 0, EPOLLIN, NULL);
	say("held");
	for (end = now() + HELD_S; now() < end;)
		wait_for(end);
	for (struct conn *c = conns; c < conns + number; c++) {
		if (!c->fd)
			continue;
		ssize_t n = recv(c->fd, buffer, 1, MSG_DONTWAIT);

		if (n == 0 || (n < 0 && errno != EAGAIN))
			error("client: a held connection has ended");
		finish(c, c->state == TALK);
	}
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double percentile(double p)
{
	return timed ? times[(long)(p * (timed - 1) + 0.5)] : 0;
}

static void client(void)
{
	double took;

	epoll = epoll_create1(0);
	start = now();
	end = start + seconds;
	if (play == PACED)
		keep_pace();
	else if (play == HOLD || play == STALL)
		hold();
	else
		keep_up();
	took = now() - begun;
	if (live)
		error("client: %d connections never %s", live, greeted ? "ended" : "answered");
	qsort(times, timed, sizeof(*times), by_value);
	printf("{\"done\": %ld, \"count\": %ld, \"in\": %lld, \"out\": %lld, \"seconds\": %.6f, "
	       "\"p50\": %.7f, \"p99\": %.7f, \"p999\": %.7f, ",
	       done, count, total_in, total_out, took, percentile(0.5), percentile(0.99),
	       percentile(0.999));
	print_errors();
}

/* ------------------------------------------------------------------------- */

static void prepare(char **argv)
{
	FILE *file = fopen(argv[4], "rb");
	uint64_t x = 88172645463325252ULL; /* xorshift64, seeded as by its author */

	if (!file)
		die(argv[4]);
	hello_len = fread(hello, 1, sizeof(hello), file);
	fclose(file);
	address(argv[2], argv[3]);
	greeting = argv[5];
	greeting_len = strlen(greeting);
	while (plays[play] && strcmp(plays[play], argv[6]))
		play++;
	seconds = atof(argv[7]);

	for (size_t i = 0; i < PATTERN; i += sizeof(x)) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		memcpy(pattern + i, &x, sizeof(x));
	}
	memcpy(pattern + PATTERN, pattern, PROBE);
}

int main(int argc, char **argv)
{
	if (argc > 7)
		prepare(argv);
	if (argc == 8 && !strcmp(argv[1], "backend") && plays[play])
		backend();
	else if (argc == 9 && !strcmp(argv[1], "client") && plays[play] &&
		 (number = atoi(argv[8])) <= CONNS_MAX)
		client();
	else
		return fprintf(stderr, "usage: see the head of traffic.c\n"), 2;
	return 0;
}
