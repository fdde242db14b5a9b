# The image: the program and CA roots, no shell. Build for another platform on a machine of that platform, or with
# emulation: docker buildx build --platform linux/amd64,linux/arm64 .
# Both bases are arguments, so that a mirror or a base of one's own can stand in. The first needs Rust and a C compiler,
# the second glibc no older than the first's, libgcc and CA certificates.
ARG BUILD_IMAGE=rust:1.95.0-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
WORKDIR /build
# rust-toolchain.toml stays outside: it names lints and a formatter besides, which would be downloaded.
COPY Cargo.toml Cargo.lock ./
COPY tests/support/Cargo.toml tests/support/
# The dependencies alone, around an empty program: a layer that only a changed Cargo.toml or Cargo.lock makes anew.
RUN mkdir src tests/support/src \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs tests/support/src/lib.rs \
    && cargo build --release --locked --bin llm-billing-webhook
COPY src src
# Cargo compares times, and the sources' may be older than the empty program's.
RUN touch src/main.rs src/lib.rs \
    && cargo build --release --locked --bin llm-billing-webhook \
    && cp target/release/llm-billing-webhook /llm-billing-webhook

FROM ${RUNTIME_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="llm-billing-webhook" \
      org.opencontainers.image.description="Admission webhook that makes every workspace pod's LLM billing env true" \
      org.opencontainers.image.source="https://github.com/Molecule-AI/llm-billing-webhook" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /llm-billing-webhook /llm-billing-webhook
# A number, or the kubelet could not tell that it is not root.
USER 65532:65532
EXPOSE 8443 8080
ENTRYPOINT ["/llm-billing-webhook"]
CMD ["serve"]
