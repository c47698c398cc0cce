/* What steps.c adds to libbpf: the steps that would be many calls from Python. */
struct splice {
	int sockets, directions;
	struct counts *counts;
	uint64_t *consumed;
};

enum { ATTACH_VERDICT = ..., MAX_EVENTS = 1024 };

void splice_log_start(void);
const char *splice_log(void);

void *splice_map(int map_fd, size_t size);
void splice_unmap(void *address, size_t size);

struct ring_buffer *splice_ring(int map_fd);
static uint32_t splice_events[1024];
static uint32_t splice_n_events;

struct join {
	int client, backend;
	uint32_t connection;
	int result;
	uint64_t cookies[2];
};

void splice_join_all(struct splice *splice, struct join *joins, int count, uint32_t limit);
int splice_leave(struct splice *splice, const uint64_t *cookies, uint32_t n);
