// SPDX-License-Identifier: Apache-2.0
/*
 * Many quick connections from one address, each from a port of its own:
 *
 *   swarm serve ADDR PORT first|last
 *   swarm ask   ADDR PORT SOURCE FIRST_PORT COUNT AT_ONCE close|reset < HELLO
 *
 * The server tells each client the address and port that it sees, and closes before or
 * after the client; it ends when its stdin does.  `ask` sends HELLO, compares what it
 * is told with what it has, and prints one line of JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	AT_ONCE_MAX = 1024,
	EVENTS = 256,
	SILENCE_MS = 15000, /* nothing at all for so long: something is stuck */
};

struct conn {
	int fd, port, sent;
};

static const int on = 1;
static const struct linger now = { .l_onoff = 1 };

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static struct sockaddr_in address(const char *host, int port)
{
	struct sockaddr_in addr = { .sin_family = AF_INET, .sin_port = htons(port) };

	if (inet_pton(AF_INET, host, &addr.sin_addr) != 1)
		die(host);
	return addr;
}

static int tell(char *text, size_t size, const struct sockaddr_in *addr)
{
	char host[INET_ADDRSTRLEN];

	inet_ntop(AF_INET, &addr->sin_addr, host, sizeof(host));
	return snprintf(text, size, "%s %d", host, ntohs(addr->sin_port));
}

static void watch(int epoll, int fd, uint32_t events, void *data)
{
	struct epoll_event event = { .events = events, .data.ptr = data };

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

/* --- server --- */

static void accept_all(int listener, int epoll)
{
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
		struct conn *c = calloc(1, sizeof(*c));

		c->fd = fd;
		watch(epoll, fd, EPOLLIN, c);
	}
}

/* 1: the connection is over. */
static int serve_one(struct conn *c, int closes_first)
{
	char buffer[8192], text[64];
	struct sockaddr_in peer;
	socklen_t size = sizeof(peer);
	ssize_t n = recv(c->fd, buffer, sizeof(buffer), 0);

	if (n <= 0)
		return n == 0 || errno != EAGAIN;
	/* a hello of one segment or of two: what comes after the answer is only read */
	if (c->sent || getpeername(c->fd, (void *)&peer, &size))
		return 0;
	c->sent = 1;
	send(c->fd, text, tell(text, sizeof(text), &peer), MSG_NOSIGNAL);
	return closes_first;
}

static void serve(struct sockaddr_in addr, int closes_first)
{
	struct epoll_event events[EVENTS];
	int epoll = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listener, (void *)&addr, sizeof(addr)) || listen(listener, 4096))
		die("listen");
	/* two addresses that no connection can have */
	watch(epoll, listener, EPOLLIN, &listener);
	watch(epoll, 0, EPOLLIN, NULL);
	puts("ready");
	fflush(stdout);
	for (;;) {
		int n = epoll_wait(epoll, events, EVENTS, -1);

		for (int i = 0; i < n; i++) {
			struct conn *c = events[i].data.ptr;

			if (!c)
				return;
			if ((void *)c == &listener) {
				accept_all(listener, epoll);
			} else if (serve_one(c, closes_first)) {
				close(c->fd);
				free(c);
			}
		}
	}
}

/* --- clients --- */

static struct {
	struct sockaddr_in to, from;
	char hello[8192];
	ssize_t hello_size;
	long same, other_port, wrong, failed;
	int resets;
	char first_error[200];
} ask;

static void failed(const char *what)
{
	if (!ask.failed++)
		snprintf(ask.first_error, sizeof(ask.first_error), "%s: %s", what, strerror(errno));
}

static void dial(int epoll, struct conn *c, int port)
{
	struct sockaddr_in from = ask.from;

	from.sin_port = htons(port);
	c->port = port;
	c->sent = 0;
	c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	if (c->fd < 0)
		die("socket");
	setsockopt(c->fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(c->fd, (void *)&from, sizeof(from)))
		die("bind");
	if (connect(c->fd, (void *)&ask.to, sizeof(ask.to)) && errno != EINPROGRESS)
		die("connect");
	watch(epoll, c->fd, EPOLLIN | EPOLLOUT | EPOLLET, c);
}

static void compare(const struct conn *c, const char *said, size_t size)
{
	struct sockaddr_in from = ask.from;
	char text[64];
	int port = c->port;

	from.sin_port = htons(port);
	int length = tell(text, sizeof(text), &from);
	size_t host = strchr(text, ' ') - text + 1;

	if (size == (size_t)length && !memcmp(text, said, size))
		ask.same++;
	else if (size > host && !memcmp(text, said, host))
		ask.other_port++;
	else
		ask.wrong++;
}

/* 1: the connection is over, well or not. */
static int talk(struct conn *c)
{
	char said[64];
	ssize_t n;

	if (!c->sent) {
		n = send(c->fd, ask.hello, ask.hello_size, MSG_NOSIGNAL);
		if (n < 0 && errno == EAGAIN)
			return 0; /* still connecting */
		if (n != ask.hello_size) {
			failed("send");
			return 1;
		}
		c->sent = 1;
	}
	n = recv(c->fd, said, sizeof(said), 0);
	if (n < 0 && errno == EAGAIN)
		return 0;
	if (n <= 0)
		failed(n ? "recv" : "end");
	else
		compare(c, said, n);
	return 1;
}

static void ask_all(int port, int count, int at_once)
{
	static struct conn conns[AT_ONCE_MAX];
	struct epoll_event events[EVENTS];
	int epoll = epoll_create1(0), open = 0, end = port + count;

	for (; open < at_once && port < end; open++)
		dial(epoll, &conns[open], port++);
	while (open) {
		int n = epoll_wait(epoll, events, EVENTS, SILENCE_MS);

		if (n == 0) {
			errno = ETIMEDOUT;
			failed("stuck");
			break;
		}
		for (int i = 0; i < n; i++) {
			struct conn *c = events[i].data.ptr;

			if (!talk(c))
				continue;
			if (ask.resets)
				setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
			if (ask.resets)
				setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
			close(c->fd);
			if (port < end)
				dial(epoll, c, port++);
			else
				open--;
		}
	}
	printf("{\"same\": %ld, \"other_port\": %ld, \"wrong\": %ld, \"failed\": %ld, "
	       "\"first_error\": \"%s\"}\n",
	       ask.same, ask.other_port, ask.wrong, ask.failed, ask.first_error);
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "serve")) {
		serve(address(argv[2], atoi(argv[3])), !strcmp(argv[4], "first"));
		return 0;
	}
	if (argc == 9 && !strcmp(argv[1], "ask") && atoi(argv[7]) <= AT_ONCE_MAX) {
		ask.to = address(argv[2], atoi(argv[3]));
		ask.from = address(argv[4], 0);
		ask.resets = !strcmp(argv[8], "reset");
		ask.hello_size = read(0, ask.hello, sizeof(ask.hello));
		ask_all(atoi(argv[5]), atoi(argv[6]), atoi(argv[7]));
		return 0;
	}
	fprintf(stderr, "usage: see the head of swarm.c\n");
	return 2;
}
