/* The libbpf calls that splice.py makes, and no others. */
struct bpf_object;
struct bpf_map;
struct bpf_program;
struct ring_buffer;

struct bpf_object *bpf_object__open_file(const char *path, const void *opts);
int bpf_object__load(struct bpf_object *obj);
void bpf_object__close(struct bpf_object *obj);
struct bpf_map *bpf_object__find_map_by_name(const struct bpf_object *obj, const char *name);
int bpf_map__fd(const struct bpf_map *map);
uint32_t bpf_map__value_size(const struct bpf_map *map);
struct bpf_program *bpf_object__find_program_by_name(const struct bpf_object *obj,
						     const char *name);
int bpf_program__fd(const struct bpf_program *prog);
int bpf_prog_attach(int prog_fd, int attachable_fd, int type, unsigned int flags);

int ring_buffer__epoll_fd(const struct ring_buffer *rb);
int ring_buffer__consume(struct ring_buffer *rb);
void ring_buffer__free(struct ring_buffer *rb);
