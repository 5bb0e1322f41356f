//! `drover-slurm-allocator`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    drover_service::main::<drover_slurm_allocator::SlurmAllocator>()
}
