//! What is to be killed, dealt beforehand: the counts are certain, only the order is random.

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;

use super::{MAY_FAIL, Plan};

/// Which moment a kill waits for, beside a turn in flight somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// Any.
    Any,
    /// Between a worker's append and the commit of the router's cursor.
    Gap,
    /// A turn is in flight on the victim's own node.
    Busy,
    /// No prompt waits or runs on the victim's own node.
    Idle,
}

/// One kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Card {
    pub(crate) kind: &'static str,
    pub(crate) when: When,
}

/// One card per kill, in random order.
///
/// Most kills go to the daemons. A worker or an agent that is killed in a turn loses that turn, and few turns may be lost: so
/// it is part of the plan how many of them are hit in one, a fifth below what may fail. The others are hit between turns.
pub(crate) fn deal(plan: &Plan, rng: &mut StdRng) -> Vec<Card> {
    let share = |per_cent: usize| (plan.kills * per_cent).div_ceil(100);
    let counts =
        [("worker", share(10)), ("codex", share(10)), ("slurm-allocator", share(15)), ("outbox-follower", share(30))];
    let mut kinds: Vec<&'static str> = counts.iter().flat_map(|&(kind, count)| vec![kind; count]).collect();
    kinds.resize(kinds.len().max(plan.kills), "router");
    kinds.shuffle(rng);
    kinds.truncate(plan.kills);

    let of_pipe = |kind: &str| matches!(kind, "router" | "outbox-follower");
    let mut gaps = plan.gap_kills.max(kinds.iter().filter(|kind| of_pipe(kind)).count() / 2);
    let mut busy = (MAY_FAIL * plan.injections as f64 * 0.8) as usize;
    let mut cards: Vec<Card> = kinds
        .into_iter()
        .map(|kind| {
            let take = |left: &mut usize, taken, otherwise| {
                if *left == 0 {
                    return otherwise;
                }
                *left -= 1;
                taken
            };
            let when = match kind {
                "worker" | "codex" => take(&mut busy, When::Busy, When::Idle),
                _ if of_pipe(kind) => take(&mut gaps, When::Gap, When::Any),
                _ => When::Any,
            };
            Card { kind, when }
        })
        .collect();
    cards.shuffle(rng);
    cards
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn whatever_the_seed_every_kind_is_killed_and_the_counts_are_as_planned() {
        let sizes = [
            Plan { seed: 0, kills: 200, injections: 1000, nodes: 8, gap_kills: 50, forget: false },
            Plan { seed: 0, kills: 16, injections: 80, nodes: 4, gap_kills: 4, forget: false },
        ];
        for (plan, seed) in sizes.iter().flat_map(|plan| (0..50).map(move |seed| (plan, seed))) {
            let cards = deal(plan, &mut StdRng::seed_from_u64(seed));
            let count = |is: &dyn Fn(&Card) -> bool| cards.iter().filter(|card| is(card)).count();
            assert_eq!(cards.len(), plan.kills);
            for kind in super::super::KINDS {
                assert!(count(&|card| card.kind == kind) > 0, "no {kind}");
            }
            assert!(count(&|card| card.when == When::Gap) >= plan.gap_kills);
            let busy = count(&|card| card.when == When::Busy);
            assert!(busy > 0 && (busy as f64) < MAY_FAIL * plan.injections as f64, "{busy}");
        }
        let [a, b] = [1, 2].map(|seed| deal(&sizes[0], &mut StdRng::seed_from_u64(seed)));
        assert_ne!(a, b, "the order is random");
    }
}
