// SPDX-License-Identifier: Apache-2.0
/* The router's native half, one translation unit.  native.cdef.h is read by the compiler here
 * and by cffi: the declarations are written once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <netinet/in.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <linux/types.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <seccomp.h>
#include "abi.h"
#include "packet.h"

struct hello;
struct pipe;
#include "native.cdef.h"
#include "hello.c"
#include "steps.c"
#include "pump.c"
#include "confine.c"
#include "conntrack.c"
