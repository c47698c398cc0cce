/* What the router's Python calls: hello.c, steps.c and pump.c. */

enum {
	HELLO_MAX = 262144, /* the most that a hello limit can be set to */
};

enum hello_status {
	HELLO_COMPLETE,
	HELLO_MORE,
	HELLO_EOF,
	HELLO_RESET,
	HELLO_NOT_TLS,
	HELLO_INVALID,
	HELLO_TOO_LARGE,
};

enum { EXT_SERVER_NAME, EXT_ALPN, EXT_VERSIONS, EXT_ECH, N_EXTENSIONS };

/* the body of an extension, as OpenSSL framed it, until the next accept, or peek; NULL: absent */
struct extension {
	const char *body;
	size_t size;
};

/* what a peek found */
struct reading {
	enum hello_status status;
	int alert; /* HELLO_INVALID: what OpenSSL would answer, 0 for nothing */
	size_t size; /* bytes received so far */
	size_t need; /* HELLO_MORE: bytes needed for another look */
	struct extension extensions[4];
};

/* an IPv4 or IPv6 address in network order, with a port */
struct endpoint {
	unsigned char address[16];
	unsigned int size;
	unsigned int port;
};

struct arrival {
	int fd;
	struct endpoint peer;
	struct hello *hello; /* HELLO_MORE: to peek again with, and to free */
	struct reading reading;
};

int hello_init(void);
struct hello *hello_new(void);
void hello_free(struct hello *hello);
void hello_restock(void);
void hello_peek(struct hello *hello, int fd, size_t limit, struct reading *reading);

void wait_for_bytes(int fd, int need);
int peek_bytes(int fd, const unsigned char **data, size_t size);
void drop_bytes(int fd, size_t size);
int send_bytes(int fd, const void *data, size_t size);

int accept_clients(int listener, size_t limit, struct arrival *arrivals, int room, int *error);
int local_endpoint(int fd, struct endpoint *local);
int discard(int fd, size_t budget);
int refuse(int fd, const void *alert, size_t size, size_t budget);
/* how to connect to backends */
struct dialler {
	int receive_buffer, keepalive_idle, epoll;
	bool ports_are_kernels; /* the kernel gives those that we choose to others as well */
};

/* A backend to connect to: from this host's address, or, where it has a family, from that of
 * *client*, which has the same.  The socket resembles that of *like*, unless -1, and has *port*,
 * or with 0 the kernel's choice.
 */
struct dial {
	char to[28], client[28]; /* struct sockaddr_in or sockaddr_in6 */
	int size; /* of either */
	int like, port;
	int fd; /* or -errno */
	int connected; /* else it is to be waited for */
};

void dial_all(const struct dialler *dialler, struct dial *dials, int count);
int socket_options(int fd, int receive_buffer, int keepalive_idle);
int socket_error(int fd);
void watch(int epoll, int fd, uint32_t events);
void watch_pairs(int epoll, const int *pairs, int count, uint32_t events);
void half_close(int fd);

enum close { CLOSE, CLOSE_RESET, CLOSE_SILENT };

int close_all(const int *fds, int count, enum close how);

int confine(void);
void conntrack_forget(int netlink, const void *flow);

/* why a pump stopped */
enum move {
	MOVE_MORE, /* the budget is spent */
	MOVE_IDLE, /* nothing to read */
	MOVE_FULL, /* the destination takes no more */
	MOVE_QUEUED, /* the kernel's backlog comes first, or is about to */
	MOVE_END, /* the source has ended */
	MOVE_FAILED, /* the source has failed */
	MOVE_BROKEN, /* the destination has failed */
};

struct pipe *pipe_new(void);
void pipe_free(struct pipe *pipe);
enum move relay_pump(struct pipe *pipe, int from, int to, size_t budget, uint64_t *moved);

void send_on_all(const int *pairs, int count, int *sent);

/* the counts of all joined directions: what BPF writes, and what we write */
struct joined {
	const struct counts *counts;
	uint64_t *consumed;
};

/* before the join, *taken* bytes came from the source, and the destination had used *given*
 * sequence numbers
 */
bool is_slow(const struct joined *joined, uint32_t direction);
enum move slow_pump(struct pipe *pipe, int from, int to, const struct joined *joined,
		    uint32_t direction, uint64_t given, size_t budget);
bool drained(int from, int to, const struct joined *joined, uint32_t direction, uint64_t taken,
	     uint64_t given);
uint64_t moved(const struct joined *joined, uint32_t direction);
