/* What packet_steps.c adds to libbpf for the packet hand-off. */
struct packet {
	int install, emit, ends, notes, rings;
	struct flow *flows;
	uint32_t owner;
	uint32_t cursor;
};
struct pair {
	uint64_t serial;
	int client, backend;
	bool foreign;
	int result;
	uint32_t number;
	bool sent, open;
	char pad[2];
};

enum { TCX_INGRESS = ..., TCX_EGRESS = ... };

int bpf_map__set_pin_path(struct bpf_map *map, const char *path);
int bpf_link_create(int prog_fd, int target_fd, int attach_type, const void *opts);
int bpf_link_update(int link_fd, int new_prog_fd, const void *opts);
int bpf_obj_pin(int fd, const char *path);
int bpf_obj_get(const char *path);

enum clsact { CLSACT_ATTACH, CLSACT_DETACH, CLSACT_FIND };
int packet_clsact(enum clsact what, int ifindex, bool egress, uint32_t handle, int prog_fd);
int packet_link_device(int link_fd);
int packet_under_way(const char *pin);

struct ring_buffer *packet_ring(struct packet *packet);
static struct flow_event packet_events[1024];
static uint32_t packet_n_events;

void packet_install_all(struct packet *packet, struct pair *pairs, int count, bool anywhere);
bool packet_acknowledged(struct packet *packet, uint32_t number);
int packet_run(int prog_fd, void *data, uint32_t size, void *out, uint32_t *out_size);
int packet_emit(struct packet *packet, void *data, uint32_t size, uint32_t ifindex);
bool packet_end(struct packet *packet, uint32_t number);
bool packet_reap(struct packet *packet, uint32_t number, uint64_t serial);
uint32_t packet_list(struct packet *packet, uint32_t *numbers, uint32_t room);
uint32_t packet_idle(struct packet *packet, uint32_t before, uint32_t *numbers, uint32_t room);
int packet_note(struct packet *packet, uint32_t number, const char *text, uint32_t size);
int packet_read_note(struct packet *packet, uint32_t number, struct note *note);
int packet_silence(int one, int other);
int packet_sequence(int fd, uint32_t numbers[2]);
