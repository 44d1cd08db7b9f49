# The image that manifests/daemonset.yaml runs: docker build -t kproxy:0.1.0 .

# Debian 12 has the Rust with library sources that the eBPF programs are built with; the rest of
# the tree is built with the image's own.
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo --locked xtask build --release

# The same Debian, for the same libc. The binary carries its programs. The tools of the firewall tell of forward chains
# that drop, and of what a kube-proxy left.
FROM debian:bookworm-slim
RUN apt-get update && apt-get install --yes --no-install-recommends iptables nftables && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/kproxy /usr/local/bin/kproxy
ENTRYPOINT ["kproxy"]
CMD ["agent"]
