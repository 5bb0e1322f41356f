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

# A real Slurm cluster on this machine (root); `just lab --nodes 8 --sacct`
lab *options:
    deploy/lab/up {{options}}

# Ends it
lab-down:
    deploy/lab/down

# A cluster to try drover on. `just sim`: the one above, and a shell on its laptop (`ssh -F "$SSH_CONFIG" login sinfo`).
# `just sim up`, `just sim on laptop`, `just sim down`: one of containers, docs/simulation.md
sim verb="lab" *options:
    {{ if verb == "lab" { "deploy/lab/up " + options + " && deploy/lab/on laptop" } else { "deploy/compose/sim " + verb + " " + options } }}
