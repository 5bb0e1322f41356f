# Formatting, clippy, dependency rules
check:
    cargo xtask lint

# Every test
test:
    cargo xtask test

# Real programs, real signals
e2e:
    cargo build --workspace --bins && cargo test --package drover-e2e

# Figures beside the ideal; `just bench control` for one of them
bench *names:
    cargo xtask bench {{names}}

# Two hundred kills
chaos:
    cargo xtask chaos local

# The whole tour on this machine
demo:
    cargo run --release -- demo
