// SPDX-License-Identifier: Apache-2.0
/* Have netfilter forget connections that this host no longer takes part in. */

#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <linux/netlink.h>

struct request {
	char data[256];
	size_t size;
};

static void put(struct request *request, const void *data, size_t size)
{
	memcpy(request->data + request->size, data, size);
	/* NLMSG_ALIGNTO and NLA_ALIGNTO */
	request->size += (size + 3) & ~3UL;
}

static size_t open_nest(struct request *request, uint16_t type)
{
	const struct nlattr head = { .nla_type = type | NLA_F_NESTED };
	size_t at = request->size;

	put(request, &head, sizeof(head));
	return at;
}

static void close_nest(struct request *request, size_t at)
{
	((struct nlattr *)(request->data + at))->nla_len = request->size - at;
}

static void put_attribute(struct request *request, uint16_t type, const void *data, size_t size)
{
	const struct nlattr head = { .nla_len = sizeof(head) + size, .nla_type = type };

	put(request, &head, sizeof(head));
	put(request, data, size);
}

/* the request to delete the connection that *from* opened to *to* */
static void put_request(struct request *request, bool is_ipv6, const __be32 from[4],
			const __be32 to[4], __be16 from_port, __be16 to_port)
{
	const uint8_t tcp = IPPROTO_TCP;
	const size_t size = is_ipv6 ? 16 : 4, skip = is_ipv6 ? 0 : 3;
	size_t begin = request->size, tuple, part;
	const struct nlmsghdr head = {
		.nlmsg_type = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE,
		.nlmsg_flags = NLM_F_REQUEST,
	};
	const struct nfgenmsg family = { .nfgen_family = is_ipv6 ? AF_INET6 : AF_INET };

	put(request, &head, sizeof(head));
	put(request, &family, sizeof(family));
	tuple = open_nest(request, CTA_TUPLE_ORIG);
	part = open_nest(request, CTA_TUPLE_IP);
	put_attribute(request, is_ipv6 ? CTA_IP_V6_SRC : CTA_IP_V4_SRC, from + skip, size);
	put_attribute(request, is_ipv6 ? CTA_IP_V6_DST : CTA_IP_V4_DST, to + skip, size);
	close_nest(request, part);
	part = open_nest(request, CTA_TUPLE_PROTO);
	put_attribute(request, CTA_PROTO_NUM, &tcp, sizeof(tcp));
	put_attribute(request, CTA_PROTO_SRC_PORT, &from_port, sizeof(from_port));
	put_attribute(request, CTA_PROTO_DST_PORT, &to_port, sizeof(to_port));
	close_nest(request, part);
	close_nest(request, tuple);
	((struct nlmsghdr *)(request->data + begin))->nlmsg_len = request->size - begin;
}

/* Delete both connections of a `struct flow`: the client's to us, and ours to the backend.  What
 * the kernel answers, that it knew none at the worst, is thrown away.
 */
void conntrack_forget(int netlink, const void *of)
{
	const struct flow *flow = of;
	const struct tuple *out = &flow->ways[BACKEND_END].out;
	struct request request = {};
	char answers[1024];

	/* to the client, turned round */
	put_request(&request, flow->is_ipv6, out->to, out->from, out->to_port, out->from_port);
	out = &flow->ways[CLIENT_END].out;
	put_request(&request, flow->is_ipv6, out->from, out->to, out->from_port, out->to_port);
	send(netlink, request.data, request.size, MSG_DONTWAIT);
	recv(netlink, answers, sizeof(answers), MSG_DONTWAIT);
}
