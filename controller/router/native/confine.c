// SPDX-License-Identifier: Apache-2.0
/* Have the kernel keep the router from what it must never do, whoever has got hold of it: open the
 * engine's socket, or start a program.
 *
 * What it serves is open by now.  io_uring is refused too, since it opens sockets past the filter.
 */

/* Returns 0 or -errno; from then on, in every thread, the refused calls fail with EPERM. */
int confine(void)
{
	static const int refused[] = { SCMP_SYS(execve), SCMP_SYS(execveat), SCMP_SYS(ptrace),
				       SCMP_SYS(io_uring_setup), SCMP_SYS(process_vm_writev) };
	scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
	int err = 0;

	if (!filter)
		return -ENOMEM;
	for (size_t i = 0; !err && i < sizeof(refused) / sizeof(*refused); i++)
		err = seccomp_rule_add(filter, SCMP_ACT_ERRNO(EPERM), refused[i], 0);
	if (!err)
		err = seccomp_rule_add(filter, SCMP_ACT_ERRNO(EPERM), SCMP_SYS(socket), 1,
				       SCMP_A0(SCMP_CMP_EQ, AF_UNIX));
	if (!err)
		err = seccomp_attr_set(filter, SCMP_FLTATR_CTL_TSYNC, 1);
	if (!err)
		err = seccomp_load(filter);
	seccomp_release(filter);
	return err;
}
