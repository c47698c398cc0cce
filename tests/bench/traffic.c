// SPDX-License-Identifier: Apache-2.0
/*
 * Both ends of the benchmark's traffic, one process each:
 *
 *   traffic backend ADDR PORT HELLO GREETING BULK_SECONDS
 *   traffic client  ADDR PORT HELLO GREETING SECONDS AT_ONCE
 *   traffic stream  ADDR PORT HELLO GREETING SECONDS
 *
 * The backend wants the exact bytes of the file HELLO, then says GREETING and, if
 * BULK_SECONDS is not 0, streams a pattern for so long.  `client` opens connections
 * one after the other, AT_ONCE of them at a time, and closes each after its greeting;
 * `stream` reads one stream to its end.  Both check every greeting, `stream` also the
 * pattern at both ends of each read, so that lost, doubled or strange bytes are errors.
 *
 * Each prints one line of JSON at its end.  The backend ends when its stdin does, and
 * every loop is bounded by time, the client's by a count of errors as well.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	HELLO_MAX = 65536,
	PATTERN = 1 << 20, /* a shift by a multiple of it shows in the total only */
	PROBE = 64, /* bytes compared at each end of a read */
	CONNS_MAX = 4096,
	ERRORS_MAX = 100, /* a contestant that is down would fail for ever */
	EVENTS = 256,
	GRACE_S = 5, /* for what is under way when time is up */
};

struct conn {
	int fd;
	size_t got;
	int sent;
};

static char hello[HELLO_MAX], pattern[PATTERN + PROBE];
static const char *greeting;
static size_t hello_len, greeting_len;
static struct sockaddr_in addr = { .sin_family = AF_INET };
static long errors;
static char first_error[200];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

__attribute__((format(printf, 1, 2))) static void error(const char *format, ...)
{
	va_list args;

	if (errors++)
		return;
	va_start(args, format);
	vsnprintf(first_error, sizeof(first_error), format, args);
	va_end(args);
}

static void watch(int epoll, int fd, uint32_t events, void *data)
{
	struct epoll_event event = { .events = events, .data.ptr = data };

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

/* --- backend ------------------------------------------------------------- */

struct backend {
	double bulk_seconds, stream_end;
	long accepted, ended, open;
	long long bytes;
};

static void drop(struct backend *b, struct conn *c)
{
	close(c->fd);
	free(c);
	b->open--;
}

static void stream_on(struct backend *b, struct conn *c)
{
	for (;;) {
		if (now() >= b->stream_end) {
			shutdown(c->fd, SHUT_WR);
			c->sent = 0;
			return;
		}
		size_t at = b->bytes % PATTERN;
		ssize_t n = send(c->fd, pattern + at, PATTERN - at, MSG_NOSIGNAL);

		if (n < 0 && errno == EAGAIN)
			return;
		if (n < 0) {
			error("backend: send: %s", strerror(errno));
			c->sent = 0;
			return;
		}
		b->bytes += n;
	}
}

static void serve(struct backend *b, struct conn *c)
{
	char buffer[HELLO_MAX];

	for (;;) {
		ssize_t n = recv(c->fd, buffer, sizeof(buffer), 0);

		if (n < 0 && errno == EAGAIN)
			break;
		if (n <= 0) {
			if (n < 0)
				error("backend: recv: %s", strerror(errno));
			else if (c->got != hello_len)
				error("backend: end after %zu of %zu bytes", c->got, hello_len);
			else
				b->ended++;
			return drop(b, c);
		}
		if (c->got + n > hello_len || memcmp(buffer, hello + c->got, n)) {
			error("backend: strange bytes at %zu", c->got);
			return drop(b, c);
		}
		c->got += n;
		if (c->got < hello_len)
			continue;
		if (send(c->fd, greeting, greeting_len, MSG_NOSIGNAL) != (ssize_t)greeting_len) {
			error("backend: greeting: %s", strerror(errno));
			return drop(b, c);
		}
		if (b->bulk_seconds > 0) {
			c->sent = 1;
			b->stream_end = now() + b->bulk_seconds;
		}
		if ((size_t)n < sizeof(buffer))
			break; /* the next event tells of the FIN */
	}
	if (c->sent)
		stream_on(b, c);
}

static int listener(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (fd < 0 || bind(fd, (void *)&addr, sizeof(addr)) || listen(fd, 4096))
		die("listen");
	return fd;
}

static void backend(double bulk_seconds)
{
	struct backend b = { .bulk_seconds = bulk_seconds };
	struct epoll_event events[EVENTS];
	int epoll = epoll_create1(0), fd = listener();
	double deadline = 0;

	/* Two addresses that no connection can have. */
	watch(epoll, fd, EPOLLIN, &fd);
	watch(epoll, 0, EPOLLIN, NULL);
	puts("ready");
	fflush(stdout);

	while (!deadline || (b.open && now() < deadline)) {
		int n = epoll_wait(epoll, events, EVENTS, 100);

		for (int i = 0; i < n; i++) {
			if (!events[i].data.ptr) {
				epoll_ctl(epoll, EPOLL_CTL_DEL, 0, NULL);
				deadline = now() + GRACE_S;
			} else if (events[i].data.ptr != &fd) {
				serve(&b, events[i].data.ptr);
			} else {
				int new;

				while ((new = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					struct conn *c = calloc(1, sizeof(*c));

					c->fd = new;
					b.accepted++;
					b.open++;
					watch(epoll, new,
					      EPOLLIN | EPOLLET | (bulk_seconds > 0 ? EPOLLOUT : 0),
					      c);
				}
			}
		}
	}
	if (b.open)
		error("backend: %ld connections never ended", b.open);
	printf("{\"accepted\": %ld, \"ended\": %ld, \"bytes\": %lld, \"errors\": %ld, "
	       "\"first_error\": \"%s\"}\n",
	       b.accepted, b.ended, b.bytes, errors, first_error);
}

/* --- client: many short connections -------------------------------------- */

static void dial(int epoll, struct conn *c)
{
	c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (c->fd < 0)
		die("socket");
	c->got = c->sent = 0;
	if (connect(c->fd, (void *)&addr, sizeof(addr)) && errno != EINPROGRESS)
		die("connect");
	watch(epoll, c->fd, EPOLLIN | EPOLLOUT | EPOLLET, c);
}

/* 1: the whole greeting came; 0: not yet; -1: an error. */
static int talk(struct conn *c)
{
	char buffer[1024];

	if (!c->sent) {
		ssize_t n = send(c->fd, hello, hello_len, MSG_NOSIGNAL);

		if (n < 0 && errno == EAGAIN)
			return 0; /* still connecting */
		if (n != (ssize_t)hello_len) {
			error("client: connect or send: %s", strerror(errno));
			return -1;
		}
		c->sent = 1;
		return 0;
	}
	ssize_t n = recv(c->fd, buffer, sizeof(buffer), 0);

	if (n < 0 && errno == EAGAIN)
		return 0;
	if (n <= 0) {
		error("client: %s after %zu bytes", n ? strerror(errno) : "end", c->got);
		return -1;
	}
	if (c->got + n > greeting_len || memcmp(buffer, greeting + c->got, n)) {
		error("client: not the greeting of the right backend");
		return -1;
	}
	c->got += n;
	return c->got == greeting_len;
}

static void client(double seconds, int at_once)
{
	static struct conn conns[CONNS_MAX];
	struct epoll_event events[EVENTS];
	int epoll = epoll_create1(0), open = at_once;
	double start = now(), end = start + seconds, t = start;
	long done = 0, in_time = 0;

	for (int i = 0; i < at_once; i++)
		dial(epoll, &conns[i]);

	while (open && t < end + GRACE_S) {
		int n = epoll_wait(epoll, events, EVENTS, 100);

		t = now();
		for (int i = 0; i < n; i++) {
			struct conn *c = events[i].data.ptr;
			int said = talk(c);

			if (!said)
				continue;
			close(c->fd); /* everything was read: this sends a FIN */
			done += said > 0;
			in_time += said > 0 && t < end;
			if (t < end && errors < ERRORS_MAX)
				dial(epoll, c);
			else
				open--;
		}
	}
	if (open)
		error("client: %d connections never answered", open);
	printf("{\"done\": %ld, \"rate\": %.1f, \"errors\": %ld, \"first_error\": \"%s\"}\n", done,
	       in_time / seconds, errors, first_error);
}

/* --- client: one long stream --------------------------------------------- */

static int same_pattern(const char *data, size_t n, long long offset)
{
	return !memcmp(data, pattern + offset % PATTERN, n < PROBE ? n : PROBE) &&
	       (n < PROBE ||
		!memcmp(data + n - PROBE, pattern + (offset + n - PROBE) % PATTERN, PROBE));
}

static void stream(double seconds)
{
	static char buffer[1 << 18];
	struct timeval patience = { .tv_sec = GRACE_S };
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	double start = 0, end = now() + seconds + GRACE_S;
	long long bytes = 0;
	ssize_t n = 0;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (fd < 0 || connect(fd, (void *)&addr, sizeof(addr)) ||
	    send(fd, hello, hello_len, MSG_NOSIGNAL) != (ssize_t)hello_len)
		error("stream: connect or send: %s", strerror(errno));
	else if (recv(fd, buffer, greeting_len, MSG_WAITALL) != (ssize_t)greeting_len ||
		 memcmp(buffer, greeting, greeting_len))
		error("stream: not the greeting of the right backend");

	start = now();
	while (!errors && (n = recv(fd, buffer, sizeof(buffer), 0)) > 0) {
		if (!same_pattern(buffer, n, bytes))
			error("stream: strange bytes in the %zd after %lld", n, bytes);
		bytes += n;
		if (now() > end)
			error("stream: did not end");
	}
	if (n < 0)
		error("stream: recv: %s", strerror(errno));
	printf("{\"done\": %d, \"rate\": %.4f, \"bytes\": %lld, \"errors\": %ld, "
	       "\"first_error\": \"%s\"}\n",
	       !errors, bytes * 8 / (now() - start) / 1e9, bytes, errors, first_error);
	close(fd);
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
	greeting = argv[5];
	greeting_len = strlen(greeting);
	addr.sin_port = htons(atoi(argv[3]));
	if (inet_pton(AF_INET, argv[2], &addr.sin_addr) != 1)
		die(argv[2]);

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
	if (argc > 5)
		prepare(argv);
	if (argc == 7 && !strcmp(argv[1], "backend"))
		backend(atof(argv[6]));
	else if (argc == 8 && !strcmp(argv[1], "client") && atoi(argv[7]) <= CONNS_MAX)
		client(atof(argv[6]), atoi(argv[7]));
	else if (argc == 7 && !strcmp(argv[1], "stream"))
		stream(atof(argv[6]));
	else
		return fprintf(stderr, "usage: see the head of traffic.c\n"), 2;
	return 0;
}
