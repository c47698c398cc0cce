# Two stages on one base: the compilers stay in the first, the virtual environment moves on.
# Plain Dockerfile syntax, so that the classic builder and Podman build it as well.
#
#   docker build -t sniroute .
#
# BASE is Debian trixie (Python 3.13, libbpf 1.5, OpenSSL 3.5) or made from it.  A network with a
# certificate authority of its own needs it there, in /usr/local/share/ca-certificates.
ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates clang gcc libbpf-dev libc6-dev libseccomp-dev libssl-dev make python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# Debian's own Python is not to be installed into (PEP 668), and the image needs no pip: so one
# environment to build with, and one to ship.
RUN make bpf \
 && python3 -m venv /opt/pip \
 && python3 -m venv --without-pip /opt/sniroute \
 && /opt/pip/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /opt/wheel . \
 && /opt/pip/bin/pip --python /opt/sniroute/bin/python install --no-cache-dir /opt/wheel/*.whl

FROM ${BASE}
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      libbpf1 libnftables1 libseccomp2 libssl3t64 python3 \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/sniroute /opt/sniroute
ENV PATH=/opt/sniroute/bin:$PATH

LABEL org.opencontainers.image.title="sniroute" \
      org.opencontainers.image.description="Route TLS connections to containers by SNI, with the bytes moved by the kernel" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)"

# Root, for engines grant capabilities to root only; run it with all dropped but
# BPF, PERFMON, NET_ADMIN and NET_BIND_SERVICE, and the host's bpf filesystem mounted
# (compose.example.yaml).
EXPOSE 443
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s CMD ["sniroute", "status"]
ENTRYPOINT ["sniroute"]
CMD ["run"]
