// SPDX-License-Identifier: Apache-2.0
/* Read a ClientHello with OpenSSL: records, reassembly and framing are the library's.
 *
 * A server-side SSL object on memory BIOs is fed the peeked bytes.  The ClientHello
 * callback runs when the message is complete and its framing is checked, before a
 * version or a cipher is negotiated; it takes the extension bodies and stops the
 * handshake there.  No key and no certificate is involved.
 */

enum { RECORD_HEADER = 5 }; /* RFC 8446, section 5.1: type, version, length */

/* hellos that are made ahead, and those done with: as many as connections that a browser opens at
 * once, and a few, of 25 kB each
 */
enum { SPARES = 8 };

struct hello {
	SSL *ssl;
	size_t seen; /* bytes fed so far */
	size_t record; /* where the last record begins that we know of */
	bool complete;
};

static SSL_CTX *hello_ctx;
static int hello_index;
static struct hello *spares[SPARES], *done_with[SPARES];
static int n_spares, n_done_with;

/* For the one thread that reads hellos: what it peeked, and the bodies that it found, of hellos
 * that are looked at together, and of one that is looked at again.
 */
static unsigned char peeked[HELLO_MAX + 1];
static unsigned char many_bodies[2 * sizeof(peeked)];
static unsigned char bodies_again[sizeof(peeked)];
static unsigned char *bodies;
static struct extension found[N_EXTENSIONS];

static const unsigned int extension_types[N_EXTENSIONS] = {
	[EXT_SERVER_NAME] = TLSEXT_TYPE_server_name,
	[EXT_ALPN] = TLSEXT_TYPE_application_layer_protocol_negotiation,
	[EXT_VERSIONS] = TLSEXT_TYPE_supported_versions,
	[EXT_ECH] = 0xfe0d, /* RFC 9849, section 5 */
};

static int on_hello(SSL *ssl, int *alert, void *arg)
{
	struct hello *hello = SSL_get_ex_data(ssl, hello_index);

	(void)alert;
	(void)arg;
	hello->complete = true;
	for (int i = 0; i < N_EXTENSIONS; i++) {
		const unsigned char *body;
		size_t size;

		found[i].body = NULL;
		found[i].size = 0;
		if (!SSL_client_hello_get0_ext(ssl, extension_types[i], &body, &size))
			continue;
		/* all bodies of a hello lie in what was peeked, for which there is room */
		found[i].body = memcpy(bodies, body, size);
		found[i].size = size;
		bodies += size;
	}
	return SSL_CLIENT_HELLO_RETRY;
}

/* Returns 0 or -1.  The first call counts. */
int hello_init(void)
{
	if (hello_ctx)
		return 0;
	hello_ctx = SSL_CTX_new(TLS_server_method());
	hello_index = SSL_get_ex_new_index(0, NULL, NULL, NULL, NULL);
	if (!hello_ctx || hello_index < 0)
		return -1;
	SSL_CTX_set_client_hello_cb(hello_ctx, on_hello, NULL);
	/* OpenSSL 3 hands out only extensions that it has heard of; 4 knows ECH, and refuses this
	 */
	SSL_CTX_add_custom_ext(hello_ctx, extension_types[EXT_ECH], SSL_EXT_CLIENT_HELLO, NULL,
			       NULL, NULL, NULL, NULL);
	/* whether a version is too old is the backend's business */
	SSL_CTX_set_min_proto_version(hello_ctx, 0);
	SSL_CTX_set_security_level(hello_ctx, 0);
	hello_restock();
	return 0;
}

static void hello_destroy(struct hello *hello)
{
	SSL_free(hello->ssl);
	free(hello);
}

static struct hello *hello_make(void)
{
	struct hello *hello = calloc(1, sizeof(*hello));
	BIO *in, *out;

	if (!hello)
		return NULL;
	hello->ssl = SSL_new(hello_ctx);
	in = BIO_new(BIO_s_mem());
	out = BIO_new(BIO_s_mem());
	if (!hello->ssl || !in || !out) {
		BIO_free(in);
		BIO_free(out);
		hello_destroy(hello);
		return NULL;
	}
	SSL_set_bio(hello->ssl, in, out);
	SSL_set_accept_state(hello->ssl);
	ERR_clear_error();
	/* nothing is there to be read yet: it gets as far as its buffers */
	if (!SSL_set_ex_data(hello->ssl, hello_index, hello) ||
	    SSL_get_error(hello->ssl, SSL_do_handshake(hello->ssl)) != SSL_ERROR_WANT_READ) {
		hello_destroy(hello);
		return NULL;
	}
	return hello;
}

struct hello *hello_new(void)
{
	return n_spares ? spares[--n_spares] : hello_make();
}

void hello_free(struct hello *hello)
{
	if (hello && n_done_with < SPARES)
		done_with[n_done_with++] = hello;
	else if (hello)
		hello_destroy(hello);
}

/* Free the hellos that are done with, and make as many anew, between two rounds: on a quiet
 * machine, where OpenSSL's code is in no cache, that takes half of the time from the accept to the
 * name.
 */
void hello_restock(void)
{
	while (n_done_with)
		hello_destroy(done_with[--n_done_with]);
	while (n_spares < SPARES) {
		spares[n_spares] = hello_make();
		if (!spares[n_spares])
			break;
		n_spares++;
	}
}

/* How many bytes there must be before another look is worth it: to the end of the record that
 * is not complete.  A hint for SO_RCVLOWAT only; what the bytes mean is decided by OpenSSL.
 */
static size_t hello_need(struct hello *hello, size_t size)
{
	while (size >= hello->record + RECORD_HEADER) {
		const unsigned char *header = peeked + hello->record;
		size_t end = hello->record + RECORD_HEADER + (header[3] << 8 | header[4]);

		if (end > size)
			return end;
		hello->record = end;
	}
	return hello->record + RECORD_HEADER;
}

/* the alert that OpenSSL wrote, 0 when it wrote none */
static int hello_alert(struct hello *hello)
{
	unsigned char record[RECORD_HEADER + 2];

	if (BIO_read(SSL_get_wbio(hello->ssl), record, sizeof(record)) != sizeof(record))
		return 0;
	return record[RECORD_HEADER + 1];
}

static enum hello_status hello_read(struct hello *hello, size_t size, size_t limit,
				    struct reading *reading)
{
	int error;

	/* content types 20 to 23 of major version 3, or this never was TLS */
	if (peeked[0] < 20 || peeked[0] > 23 || (size > 1 && peeked[1] != 3))
		return HELLO_NOT_TLS;
	if (size > hello->seen) {
		BIO_write(SSL_get_rbio(hello->ssl), peeked + hello->seen, size - hello->seen);
		hello->seen = size;
	}
	ERR_clear_error();
	error = SSL_get_error(hello->ssl, SSL_do_handshake(hello->ssl));
	if (hello->complete && error == SSL_ERROR_WANT_CLIENT_HELLO_CB) {
		memcpy(reading->extensions, found, sizeof(found));
		/* it reads a record at a time: what comes behind the hello's last one is left */
		reading->size -= BIO_ctrl_pending(SSL_get_rbio(hello->ssl));
		return HELLO_COMPLETE;
	}
	if (error != SSL_ERROR_WANT_READ) {
		reading->alert = hello_alert(hello);
		return HELLO_INVALID;
	}
	/* more than *limit* peeked, and still no hello */
	if (size > limit)
		return HELLO_TOO_LARGE;
	reading->need = hello_need(hello, size);
	if (reading->need > limit)
		reading->need = limit + 1;
	return HELLO_MORE;
}

/* Look at what *fd* has received, without taking it.
 *
 * Returns how much that is, 0 at the end, -errno.
 */
static ssize_t look(int fd, size_t size)
{
	ssize_t got = recv(fd, peeked, size, MSG_PEEK);

	return got < 0 ? -errno : got;
}

/* The socket does not become readable before it has *need* bytes, or has ended. */
void wait_for_bytes(int fd, int need)
{
	setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &need, sizeof(need));
}

static void look_at_hello(struct hello *hello, int fd, size_t limit, struct reading *reading)
{
	ssize_t size = look(fd, limit + 1);

	memset(reading, 0, sizeof(*reading));
	reading->size = hello->seen;
	if (size == -EAGAIN) {
		reading->need = RECORD_HEADER;
		reading->status = HELLO_MORE;
	} else if (size < 0) {
		reading->status = HELLO_RESET;
	} else if (size == 0) {
		reading->status = HELLO_EOF;
	} else {
		reading->size = size;
		reading->status = hello_read(hello, size, limit, reading);
	}
	if (reading->status == HELLO_MORE)
		wait_for_bytes(fd, reading->need);
}

/* Look at the hello in what *fd* has received.  When there is too little, the socket waits for
 * what *need* says.
 */
void hello_peek(struct hello *hello, int fd, size_t limit, struct reading *reading)
{
	bodies = bodies_again;
	look_at_hello(hello, fd, limit, reading);
}

/* What *fd* has received, up to *size* bytes of it, for someone else to read.
 *
 * Returns as look().
 */
int peek_bytes(int fd, const unsigned char **data, size_t size)
{
	*data = peeked;
	return look(fd, size < sizeof(peeked) ? size : sizeof(peeked));
}
