# The image: the program and CA certificates, no shell. Build for another platform on a machine of that platform, or
# with emulation: docker buildx build --platform linux/amd64,linux/arm64 .
# Both base images are arguments, so that you can use a mirror or your own. The build image needs Rust and a C compiler.
# The runtime image needs libgcc, CA certificates, and a glibc at least as new as the build image's.
ARG BUILD_IMAGE=rust:1.95.0-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
WORKDIR /build
# rust-toolchain.toml is not copied: rustup would download the lints and the formatter that it names.
COPY Cargo.toml Cargo.lock ./
COPY tests/support/Cargo.toml tests/support/
# Builds the dependencies with an empty program: a layer that is rebuilt only if Cargo.toml or Cargo.lock changes.
RUN mkdir src tests/support/src \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs tests/support/src/lib.rs \
    && cargo build --release --locked --bin llm-billing-webhook
COPY build.rs ./
COPY src src
# Cargo compares modification times, and the sources may be older than the empty program.
RUN touch src/main.rs src/lib.rs \
    && cargo build --release --locked --bin llm-billing-webhook \
    && cp target/release/llm-billing-webhook /llm-billing-webhook

FROM ${RUNTIME_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="llm-billing-webhook" \
      org.opencontainers.image.description="Admission webhook that sets the environment variables of workspace pods to match their LLM billing mode" \
      org.opencontainers.image.source="https://github.com/Molecule-AI/llm-billing-webhook" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /llm-billing-webhook /llm-billing-webhook
# Numeric, so that the kubelet can verify runAsNonRoot.
USER 65532:65532
EXPOSE 8443 8080
ENTRYPOINT ["/llm-billing-webhook"]
CMD ["serve"]
