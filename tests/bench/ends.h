/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What both pairs of ends, traffic.c and tls.c, have in common.
 */
#ifndef ENDS_H
#define ENDS_H

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
	CONNS_MAX = 8192,
	ERRORS_MAX = 100, /* a contestant that is down would fail for ever */
	EVENTS = 256,
	GRACE_S = 5, /* for what is under way when time is up */
};

static struct sockaddr_in addr = { .sin_family = AF_INET };
static const char *greeting;
static size_t greeting_len;
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

/* The end of every line that an end prints. */
static void print_errors(void)
{
	printf("\"errors\": %ld, \"first_error\": \"%s\"}\n", errors, first_error);
}

static void say(const char *word)
{
	puts(word);
	fflush(stdout);
}

static void watch(int epoll, int fd, uint32_t events, void *data)
{
	struct epoll_event event = { .events = events, .data.ptr = data };

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

static void address(const char *ip, const char *port)
{
	addr.sin_port = htons(atoi(port));
	if (inet_pton(AF_INET, ip, &addr.sin_addr) != 1)
		die(ip);
}

static int listener(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (fd < 0 || bind(fd, (void *)&addr, sizeof(addr)) || listen(fd, 4096))
		die("listen");
	return fd;
}

static int dialled(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

	if (fd < 0)
		die("socket");
	if (connect(fd, (void *)&addr, sizeof(addr)) && errno != EINPROGRESS)
		die("connect");
	return fd;
}

#endif
