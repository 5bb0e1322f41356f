//! `fake-slurm`: a fake for tests, not Slurm. See `drover_testkit::fake_slurm`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    drover_testkit::fake_slurm::main(args)
}
