// SPDX-License-Identifier: Apache-2.0
/* Have the kernel keep the router from what it must never do, whoever has got hold of it: open the
 * engine's socket, start a program, look into another process, or change files, which uid 0 may
 * without any capability.
 *
 * What it serves is open by now.  io_uring is refused too, since it opens files and sockets past
 * the filter, and openat2, whose flags a filter can not see.  Not refused are unlink and rmdir: the
 * control socket's name and the pins are still to go.
 */

#include <fcntl.h>
#include <sys/syscall.h>

static const int refused[] = {
	SCMP_SYS(execve), SCMP_SYS(execveat), SCMP_SYS(io_uring_setup),

	/* the controller's memory and descriptors, the engine's socket among them */
	SCMP_SYS(ptrace), SCMP_SYS(process_vm_readv), SCMP_SYS(process_vm_writev),
	SCMP_SYS(pidfd_open), SCMP_SYS(pidfd_getfd),

	/* files, with `writing` below */
	SCMP_SYS(creat), SCMP_SYS(openat2), SCMP_SYS(truncate), SCMP_SYS(mkdir), SCMP_SYS(mkdirat),
	SCMP_SYS(mknod), SCMP_SYS(mknodat), SCMP_SYS(link), SCMP_SYS(linkat), SCMP_SYS(symlink),
	SCMP_SYS(symlinkat), SCMP_SYS(rename), SCMP_SYS(renameat), SCMP_SYS(renameat2),
	SCMP_SYS(chmod), SCMP_SYS(fchmod), SCMP_SYS(fchmodat),
#ifdef __NR_fchmodat2 /* which libseccomp may not know */
	__NR_fchmodat2,
#endif
	SCMP_SYS(chown), SCMP_SYS(fchown), SCMP_SYS(lchown), SCMP_SYS(fchownat)
};

/* of open and openat: what is not reading; O_TRUNC writes in any mode */
static const struct {
	int mask;
	int value;
} writing[] = {
	{ O_ACCMODE, O_WRONLY },
	{ O_ACCMODE, O_RDWR },
	{ O_CREAT, O_CREAT },
	{ O_TRUNC, O_TRUNC },
};

/* Returns 0 or -errno; from then on, in every thread, the refused calls fail with EPERM. */
int confine(void)
{
	const uint32_t no = SCMP_ACT_ERRNO(EPERM);
	scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
	int err = 0;

	if (!filter)
		return -ENOMEM;
	for (size_t i = 0; !err && i < sizeof(refused) / sizeof(*refused); i++)
		err = seccomp_rule_add(filter, no, refused[i], 0);
	for (size_t i = 0; !err && i < sizeof(writing) / sizeof(*writing); i++) {
		const scmp_datum_t mask = writing[i].mask, value = writing[i].value;

		err = seccomp_rule_add(filter, no, SCMP_SYS(open), 1,
				       SCMP_A1(SCMP_CMP_MASKED_EQ, mask, value));
		if (!err)
			err = seccomp_rule_add(filter, no, SCMP_SYS(openat), 1,
					       SCMP_A2(SCMP_CMP_MASKED_EQ, mask, value));
	}
	if (!err)
		err = seccomp_rule_add(filter, no, SCMP_SYS(socket), 1,
				       SCMP_A0(SCMP_CMP_EQ, AF_UNIX));
	if (!err)
		err = seccomp_attr_set(filter, SCMP_FLTATR_CTL_TSYNC, 1);
	if (!err)
		err = seccomp_load(filter);
	seccomp_release(filter);
	return err;
}
