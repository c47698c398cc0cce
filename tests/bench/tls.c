// SPDX-License-Identifier: Apache-2.0
/*
 * Both ends of real TLS 1.3, one process each:
 *
 *   tls backend ADDR PORT CHAIN KEY GREETING
 *   tls client  ADDR PORT CA NAME GREETING SECONDS AT_ONCE
 *
 * The client makes a full handshake for NAME, checks the certificate against CA, reads
 * GREETING and closes; then it opens the next one.  So an answer proves that nobody ended
 * TLS on the way.  No session is resumed: each handshake has its signature.
 *
 * Output, errors and ends are as in traffic.c.
 */
#define _GNU_SOURCE
#include "ends.h"

#include <openssl/err.h>
#include <openssl/ssl.h>

struct conn {
	int fd;
	SSL *ssl;
	size_t got;
};

static SSL_CTX *ctx;
static long done, count, accepted, ended, serving;
static int epoll;

static void hang_up(struct conn *c)
{
	SSL_free(c->ssl);
	close(c->fd);
}

/* 0: would block; -1: an error, which is told. */
static int why(struct conn *c, int said, const char *where)
{
	int reason = SSL_get_error(c->ssl, said);

	if (reason == SSL_ERROR_WANT_READ || reason == SSL_ERROR_WANT_WRITE)
		return 0;
	error("%s: %s", where,
	      ERR_peek_error() ? ERR_reason_error_string(ERR_peek_error()) : strerror(errno));
	ERR_clear_error();
	return -1;
}

/* --- backend ------------------------------------------------------------- */

/* 0: wait for an event; 1: well ended; -1: an error. */
static int serve(struct conn *c)
{
	char byte;
	int said;

	if (!c->got) {
		said = SSL_accept(c->ssl);
		if (said <= 0)
			return why(c, said, "backend: handshake");
		said = SSL_write(c->ssl, greeting, greeting_len);
		if (said <= 0)
			return why(c, said, "backend: greeting");
		c->got = 1;
	}
	said = SSL_read(c->ssl, &byte, 1);
	if (said <= 0 && SSL_get_error(c->ssl, said) == SSL_ERROR_ZERO_RETURN) {
		ended++;
		return 1;
	}
	return said > 0 ? -1 : why(c, said, "backend: end");
}

static void backend(void)
{
	struct epoll_event events[EVENTS];
	int fd = listener(), new;
	double deadline = 0;

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
				if (!serve(c))
					continue;
				hang_up(c);
				free(c);
				serving--;
			} else {
				while ((new = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					c = calloc(1, sizeof(*c));
					c->fd = new;
					c->ssl = SSL_new(ctx);
					SSL_set_fd(c->ssl, new);
					accepted++;
					serving++;
					watch(epoll, new, EPOLLIN | EPOLLET, c);
				}
			}
		}
	}
	if (serving)
		error("backend: %ld connections never ended", serving);
	printf("{\"accepted\": %ld, \"ended\": %ld, \"in\": 0, \"out\": 0, ", accepted, ended);
	print_errors();
}

/* --- client -------------------------------------------------------------- */

static void dial(struct conn *c, const char *name)
{
	c->fd = dialled();
	c->got = 0;
	c->ssl = SSL_new(ctx);
	SSL_set_fd(c->ssl, c->fd);
	SSL_set_tlsext_host_name(c->ssl, name);
	SSL_set1_host(c->ssl, name);
	SSL_set_connect_state(c->ssl);
	watch(epoll, c->fd, EPOLLIN | EPOLLOUT | EPOLLET, c);
}

/* 0: wait for an event; 1: the whole greeting came; -1: an error. */
static int talk(struct conn *c)
{
	char buffer[1024];
	int n, broken = 0;
	socklen_t len = sizeof(broken);

	/* a connection under way is no error yet, but OpenSSL would take it for one */
	if (!c->got && getpeername(c->fd, (void *)&(struct sockaddr_in){ 0 },
				   &(socklen_t){ sizeof(struct sockaddr_in) })) {
		getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &broken, &len);
		if (broken)
			error("client: connect: %s", strerror(broken));
		return broken ? -1 : 0;
	}
	n = SSL_read(c->ssl, buffer, sizeof(buffer));
	if (n <= 0)
		return why(c, n, "client: handshake");
	if (c->got + n > greeting_len || memcmp(buffer, greeting + c->got, n)) {
		error("client: not the greeting of the right backend");
		return -1;
	}
	c->got += n;
	return c->got == greeting_len;
}

static void client(const char *name, double seconds, int at_once)
{
	static struct conn conns[CONNS_MAX];
	struct epoll_event events[EVENTS];
	double start = now(), end = start + seconds;
	int live = 0;

	while (live < at_once)
		dial(&conns[live++], name);

	while (live && now() < end + GRACE_S) {
		int n = epoll_wait(epoll, events, EVENTS, 100);

		for (int i = 0; i < n; i++) {
			struct conn *c = events[i].data.ptr;
			int said = talk(c);

			if (!said)
				continue;
			if (said > 0)
				SSL_shutdown(c->ssl);
			hang_up(c);
			done += said > 0;
			count += said > 0 && now() < end;
			if (now() < end && errors < ERRORS_MAX)
				dial(c, name);
			else
				live--;
		}
	}
	if (live)
		error("client: %d connections never answered", live);
	printf("{\"done\": %ld, \"count\": %ld, \"in\": 0, \"out\": 0, \"seconds\": %.6f, ", done,
	       count, now() - start);
	print_errors();
}

/* ------------------------------------------------------------------------- */

static SSL_CTX *context(const SSL_METHOD *method)
{
	SSL_CTX *made = SSL_CTX_new(method);

	if (!made || !SSL_CTX_set_min_proto_version(made, TLS1_3_VERSION))
		die("OpenSSL");
	SSL_CTX_set_session_cache_mode(made, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_num_tickets(made, 0);
	return made;
}

int main(int argc, char **argv)
{
	if (argc < 7)
		return fprintf(stderr, "usage: see the head of tls.c\n"), 2;
	address(argv[2], argv[3]);
	greeting = argv[6];
	greeting_len = strlen(greeting);
	epoll = epoll_create1(0);
	if (argc == 7 && !strcmp(argv[1], "backend")) {
		ctx = context(TLS_server_method());
		if (SSL_CTX_use_certificate_chain_file(ctx, argv[4]) != 1 ||
		    SSL_CTX_use_PrivateKey_file(ctx, argv[5], SSL_FILETYPE_PEM) != 1)
			die("certificate");
		backend();
	} else if (argc == 9 && !strcmp(argv[1], "client") && atoi(argv[8]) <= CONNS_MAX) {
		ctx = context(TLS_client_method());
		if (SSL_CTX_load_verify_locations(ctx, argv[4], NULL) != 1)
			die("CA");
		SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, NULL);
		client(argv[5], atof(argv[7]), atoi(argv[8]));
	} else {
		return fprintf(stderr, "usage: see the head of tls.c\n"), 2;
	}
	return 0;
}
