//! The short size of what `cargo xtask chaos slurm` does: the same code, cheap faults, few prompts.

use std::time::Duration;

use drover_e2e::slurm::Seat;
use drover_e2e::slurm::chaos::{Fault, Plan, run};
use drover_testkit::lab::{Options, usable};
use drover_testkit::{skip, this_test};

#[test]
fn nothing_is_lost_and_nothing_runs_twice_whatever_becomes_of_connection_and_job() {
    if let Err(why) = usable(&Options::default()) {
        return skip(&this_test(), &why);
    }
    let plan = Plan {
        seed: rand::random(),
        seat: Seat::Laptop,
        nodes: 3,
        injections: 40,
        margin: Duration::from_secs(2),
        long: Duration::from_secs(5),
        cache_seconds: 0,
        faults: vec![Fault::SshCut, Fault::Requeue],
    };
    let outcomes = run(&plan, |outcome| println!("{outcome:?}")).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(outcomes.len(), 2);
}
