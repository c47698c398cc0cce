// SPDX-License-Identifier: Apache-2.0
/* Steps of a connection that would be many system calls from Python.  Errors are -errno. */

/* linux/in.h, since Linux 6.3 */
#define LOCAL_PORT_RANGE 51

static const int on = 1;

/* --- the client's side: accept, peek, refuse --- */

/* an IPv4-mapped address is the IPv4 address that it stands for */
static void read_endpoint(const struct sockaddr_storage *from, struct endpoint *to)
{
	if (from->ss_family == AF_INET) {
		const struct sockaddr_in *in = (const struct sockaddr_in *)from;

		to->port = ntohs(in->sin_port);
		to->size = sizeof(in->sin_addr);
		memcpy(to->address, &in->sin_addr, to->size);
	} else {
		const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)from;
		size_t skip = IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr) ? 12 : 0;

		to->port = ntohs(in6->sin6_port);
		to->size = sizeof(in6->sin6_addr) - skip;
		memcpy(to->address, in6->sin6_addr.s6_addr + skip, to->size);
	}
}

/* The address that a client connected to; 0 or -errno. */
int local_endpoint(int fd, struct endpoint *local)
{
	struct sockaddr_storage address;
	socklen_t size = sizeof(address);

	if (getsockname(fd, (struct sockaddr *)&address, &size))
		return -errno;
	read_endpoint(&address, local);
	return 0;
}

/* Accept one client and look at its hello.  What is not complete yet leaves a hello to go on with.
 *
 * Returns 0 or -errno.
 */
static int accept_client(int listener, size_t limit, struct arrival *arrival)
{
	struct sockaddr_storage peer;
	socklen_t size = sizeof(peer);
	int fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);

	if (fd < 0)
		return -errno;
	read_endpoint(&peer, &arrival->peer);
	arrival->hello = hello_new();
	if (!arrival->hello) {
		close(fd);
		return -ENOMEM;
	}
	arrival->fd = fd;
	look_at_hello(arrival->hello, fd, limit, &arrival->reading);
	if (arrival->reading.status != HELLO_MORE) {
		hello_free(arrival->hello);
		arrival->hello = NULL;
	}
	return 0;
}

/* Accept clients, *room* at most, and look at their hellos: one after the other, while the code for
 * that is in the processor's caches.
 *
 * Returns how many; *error* is the errno that came next, 0 if none.
 */
int accept_clients(int listener, size_t limit, struct arrival *arrivals, int room, int *error)
{
	int count = 0;

	bodies = many_bodies;
	*error = 0;
	/* what is left of the room for bodies is as much as one hello may need */
	while (count < room && !*error && bodies <= many_bodies + sizeof(peeked)) {
		*error = -accept_client(listener, limit, arrivals + count);
		if (!*error)
			count++;
		else if (*error == ECONNABORTED || *error == EINTR || *error == EPROTO)
			*error = 0;
	}
	return count;
}

/* Throw away what *fd* has received, at most *budget* bytes of it.
 *
 * Returns 1 when more may come, 0 at the end, -errno.
 */
int discard(int fd, size_t budget)
{
	while (budget) {
		/* MSG_TRUNC: TCP drops the bytes without copying them (tcp(7)) */
		ssize_t size = recv(fd, NULL, budget, MSG_TRUNC);

		if (size == 0)
			return 0;
		if (size < 0)
			return errno == EAGAIN ? 1 : -errno;
		budget -= size;
	}
	return -EMSGSIZE;
}

/* Say a last word and end our half.  What came in is thrown away first: closing with unread
 * bytes sends a RST, which may overtake the alert.
 *
 * Returns as discard().
 */
int refuse(int fd, const void *alert, size_t size, size_t budget)
{
	int lowat = 1, rest;

	setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof(lowat));
	rest = discard(fd, budget);
	if (rest < 0)
		return rest;
	if (size && send(fd, alert, size, MSG_NOSIGNAL) < 0)
		return -errno;
	if (shutdown(fd, SHUT_WR))
		return -errno;
	return rest;
}

/* --- the backend's side --- */

int socket_options(int fd, int receive_buffer, int keepalive_idle)
{
	/* beyond net.core.rmem_max only with CAP_NET_ADMIN */
	if (receive_buffer &&
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &receive_buffer, sizeof(receive_buffer)) &&
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer)))
		return -errno;
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) ||
	    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on)) ||
	    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &keepalive_idle, sizeof(keepalive_idle)))
		return -errno;
	return 0;
}

/* Bind to *address* with *port*; with 0 the port is chosen at connect, when all of the connection's
 * address is known.  With SO_REUSEADDR a port in TIME_WAIT is free.
 */
static int bind_port(int fd, struct sockaddr_storage *address, int size, int port)
{
	const int option = port ? SO_REUSEADDR : IP_BIND_ADDRESS_NO_PORT;

	/* the port lies at the same place in both kinds of address */
	((struct sockaddr_in *)address)->sin_port = htons(port);
	if (setsockopt(fd, port ? SOL_SOCKET : IPPROTO_IP, option, &on, sizeof(on)) ||
	    bind(fd, (struct sockaddr *)address, size))
		return -errno;
	return 0;
}

/* Have connect() take *port*.  Where that is one of the kernel's own, it can be asked to choose
 * among this one, which others' connections may have to other backends; before Linux 6.3 and
 * elsewhere it is bound to, which others that have it prevent.
 */
static int take_port(int fd, int family, int size, int port, bool is_kernels)
{
	struct sockaddr_storage anywhere = { .ss_family = family };
	uint32_t range = (uint32_t)port << 16 | port;

	if (is_kernels && !setsockopt(fd, IPPROTO_IP, LOCAL_PORT_RANGE, &range, sizeof(range)))
		return 0;
	return bind_port(fd, &anywhere, size, port);
}

/* Bind to a client's address, which is none of ours (IP_TRANSPARENT). */
static int bind_as_client(int fd, const struct sockaddr *client, int size, int port)
{
	struct sockaddr_storage address;
	int err;

	if (client->sa_family == AF_INET)
		err = setsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &on, sizeof(on));
	else
		err = setsockopt(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, &on, sizeof(on));
	if (err)
		return -errno;
	memcpy(&address, client, size);
	return bind_port(fd, &address, size, port);
}

/* Connect; a backend on this host has answered before the call returns, as a second one tells.
 *
 * Returns 0, -EINPROGRESS when it has not answered yet, -errno.
 */
static int try_connect(int fd, const struct sockaddr *to, int size)
{
	if (!connect(fd, to, size))
		return 0;
	if (errno == EINPROGRESS && !connect(fd, to, size))
		return 0;
	return errno == EALREADY ? -EINPROGRESS : -errno;
}

#define TIMESTAMPS_SIZE 12 /* of a segment, with its padding */

/* What TCP_MAXSEG takes.  Only loopback has larger segments, and no flow is made of what comes by
 * it; smaller ones are of a peer that means less than RFC 9293 (3.7.1) has it take.
 */
enum { SMALLEST_SEGMENT = 88, LARGEST_SEGMENT = 32767 };

/* Offer a backend no more than the client of *like* has: largest segments, timestamps, SACK.  Then
 * the packets of one can be translated into the other's (packet.bpf.c, egress).
 */
static int resemble(int fd, int like)
{
	struct tcp_info info = {};
	socklen_t size = offsetof(struct tcp_info, tcpi_unacked);
	int segment, lacks = 0;

	if (getsockopt(like, IPPROTO_TCP, TCP_INFO, &info, &size))
		return -errno;
	segment = info.tcpi_snd_mss;
	if (info.tcpi_options & TCPI_OPT_TIMESTAMPS)
		segment += TIMESTAMPS_SIZE;
	else
		lacks |= LACKS_TIMESTAMPS;
	if (!(info.tcpi_options & TCPI_OPT_SACK))
		lacks |= LACKS_SACK;
	if (segment < SMALLEST_SEGMENT)
		segment = SMALLEST_SEGMENT;
	if (segment > LARGEST_SEGMENT)
		segment = LARGEST_SEGMENT;
	if (setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof(segment)))
		return -errno;
	if (!lacks)
		return 0;
	lacks |= LACKS_MARK;
	return setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &lacks, sizeof(lacks)) ? -errno : 0;
}

static int dial(const struct dialler *dialler, struct dial *dial)
{
	const struct sockaddr *to = (const struct sockaddr *)dial->to;
	const struct sockaddr *client = (const struct sockaddr *)dial->client;
	struct epoll_event event = { .events = EPOLLOUT | EPOLLET };
	int fd, err;

	fd = socket(to->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP);
	if (fd < 0)
		return -errno;
	event.data.fd = fd;
	err = socket_options(fd, dialler->receive_buffer, dialler->keepalive_idle);
	if (!err && dial->like >= 0)
		err = resemble(fd, dial->like);
	if (!err && client->sa_family)
		err = bind_as_client(fd, client, dial->size, dial->port);
	else if (!err && dial->port)
		err = take_port(fd, to->sa_family, dial->size, dial->port,
				dialler->ports_are_kernels);
	if (!err)
		err = try_connect(fd, to, dial->size);
	dial->connected = !err;
	if (err == -EINPROGRESS)
		err = epoll_ctl(dialler->epoll, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
	if (err) {
		close(fd);
		return err;
	}
	return fd;
}

/* Begin to connect to *count* backends, one after the other.  Of an outcome that is still to come
 * dialler.epoll tells as EPOLLOUT, EPOLLERR or EPOLLHUP.
 */
void dial_all(const struct dialler *dialler, struct dial *dials, int count)
{
	for (int i = 0; i < count; i++)
		dials[i].fd = dial(dialler, &dials[i]);
}

/* Take what was looked at; TCP drops it without copying it (tcp(7)). */
void drop_bytes(int fd, size_t size)
{
	recv(fd, NULL, size, MSG_TRUNC);
}

/* Returns how much of *data* was sent, -errno. */
int send_bytes(int fd, const void *data, size_t size)
{
	ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);

	return sent < 0 && errno != EAGAIN ? -errno : sent < 0 ? 0 : (int)sent;
}

/* 0, or the error that a socket has met */
int socket_error(int fd)
{
	int error = 0;
	socklen_t size = sizeof(error);

	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size))
		return errno;
	return error;
}

/* Have the kernel announce what is queued: the verdict of a joined socket runs over it
 * (tcp_set_rcvlowat calls tcp_data_ready).
 */
static void kick(int fd)
{
	int lowat = 1;

	setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof(lowat));
}

/* Hear of *events* of a socket, registered or not; of what holds already, too. */
void watch(int epoll, int fd, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	if (epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event))
		epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

/* The same for *count* pairs of sockets, which are registered only if the hello or the backend made
 * us wait; then have the kernel announce what is queued in them.
 */
void watch_pairs(int epoll, const int *pairs, int count, uint32_t events)
{
	for (int i = 0; i < 2 * count; i++) {
		struct epoll_event event = { .events = events, .data.fd = pairs[i] };

		if (epoll_ctl(epoll, EPOLL_CTL_ADD, pairs[i], &event))
			epoll_ctl(epoll, EPOLL_CTL_MOD, pairs[i], &event);
	}
	for (int i = 0; i < 2 * count; i++)
		kick(pairs[i]);
}

/* --- the end --- */

void half_close(int fd)
{
	shutdown(fd, SHUT_WR);
}

/* Close sockets; with a RST, so that the other side sees that bytes are missing, or without a word
 * (tcp_close).
 *
 * Returns 0, -EBADF if one was none, or why one was not silenced, -errno.
 */
int close_all(const int *fds, int count, enum close how)
{
	const struct linger now = { .l_onoff = 1, .l_linger = 0 };
	const int repair = TCP_REPAIR_ON;
	int err = 0;

	for (int i = 0; i < count; i++) {
		if (how == CLOSE_RESET)
			setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &now, sizeof(now));
		else if (how == CLOSE_SILENT &&
			 setsockopt(fds[i], IPPROTO_TCP, TCP_REPAIR, &repair, sizeof(repair)))
			err = -errno;
		if (close(fds[i]) && errno == EBADF)
			return -EBADF;
	}
	return err;
}
