//! The far side of a cluster, against a real sshd that each test starts for itself.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "a test that fails shows the log of its server")]

mod doctor;
mod site;
#[path = "../../../ssh/tests/sshd/support.rs"]
#[expect(dead_code, reason = "the same server as for the tests of the connection itself; not all of it is needed here")]
mod support;
mod way;
