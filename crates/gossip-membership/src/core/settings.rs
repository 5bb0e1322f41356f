//! Every time and bound of the protocol. All but a few follow from one configured period, so that one knob scales them.

use std::time::Duration;

/// What the configuration decides, and what follows from it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `discovery.gossip_interval`: pause between two probes.
    pub gossip_interval: Duration,
    /// `discovery.node_timeout`: longest silence of a node until it is suspect.
    pub node_timeout: Duration,
    /// `discovery.dead_node_timeout`: how long a dead node stays listed.
    pub dead_node_timeout: Duration,
    /// `discovery.push_pull_interval`: longest time without comparing the full state with another node.
    pub push_pull_interval: Duration,
    /// Bytes that the body of a datagram may have.
    pub payload: usize,
    /// Switched off one by one by proofs that want to see their own judge find the fault.
    #[doc(hidden)]
    pub guards: Guards,
}

/// Parts of the protocol without which an invariant must break. All are on outside proofs.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guards {
    pub refute: bool,
    pub own_pause: bool,
    pub tombstones: bool,
    pub patience: bool,
}

impl Default for Guards {
    fn default() -> Self {
        Self { refute: true, own_pause: true, tombstones: true, patience: true }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            gossip_interval: Duration::from_secs(1),
            node_timeout: Duration::from_secs(5),
            dead_node_timeout: Duration::from_secs(30),
            push_pull_interval: Duration::from_secs(30),
            payload: 1300,
            guards: Guards::default(),
        }
    }
}

impl Settings {
    /// How many nodes news is sent to at each tick.
    pub(super) const FAN_OUT: usize = 3;
    /// How many nodes are asked to ping on one's behalf.
    pub(super) const RELAYS: usize = 3;
    /// Confirmations after which a suspicion is as short as it gets.
    pub(super) const CONFIRMATIONS: usize = 3;
    /// Dead nodes and old seeds are tried again so often.
    pub(super) const RECONNECT_PERIODS: u32 = 3;

    /// Pause between two probes. The neighbour on the ring is probed every second time, and a probe takes up to one
    /// period: three periods from the last sign of life to the suspicion, which `node_timeout` bounds.
    pub(super) fn period(&self) -> Duration {
        self.gossip_interval.min(self.node_timeout / 3).max(Duration::from_millis(1))
    }

    /// Wait for the answer to a ping, before others are asked.
    pub(super) fn direct_timeout(&self) -> Duration {
        self.period() * 3 / 10
    }

    /// Wait for any answer at all, counted from the ping.
    pub(super) fn probe_timeout(&self) -> Duration {
        self.period() * 9 / 10
    }

    /// Pause between two rounds of gossip while there is news.
    pub(super) fn tick(&self) -> Duration {
        self.period() / 5
    }

    /// News waits so long for more of it.
    pub(super) fn batch(&self) -> Duration {
        (self.period() / 50).min(Duration::from_millis(20))
    }

    /// To how many nodes one piece of news is sent by one node.
    pub(super) fn retransmits(members: usize) -> u16 {
        let rounds = (4.0 * (members as f64 + 1.0).log10()).ceil().max(2.0);
        (rounds * Self::FAN_OUT as f64) as u16
    }

    /// Shortest and longest suspicion of a node that is silent. A process that is stopped for three periods and runs for
    /// half of one has to be able to answer: the shortest is longer than that. In a larger cluster both the
    /// accusation and the answer have further to go.
    pub(super) fn silent_suspicion(&self, members: usize) -> (Duration, Duration) {
        if !self.guards.patience {
            return (self.period(), self.period());
        }
        let scale = ((members as f64).max(1.0).log10() / 1.5).max(1.0);
        let shortest = self.period().mul_f64(3.2 * scale);
        (shortest, shortest * 3)
    }

    /// Suspicion of a node whose host refuses connections: the process is gone, and only needs a chance to object.
    pub(super) fn refused_suspicion(&self) -> Duration {
        self.period()
    }

    /// How late a timer must be for this node to know that it has not been running.
    pub(super) fn own_pause(&self) -> Duration {
        self.period() / 2
    }

    /// How long views may differ before one is pulled.
    pub(super) fn mismatch_patience(&self) -> Duration {
        self.period()
    }

    /// A verdict older than this does not count as news: its node may have answered long ago, elsewhere.
    pub(super) fn fresh_verdict(&self) -> Duration {
        self.period() * 4
    }

    /// How long a removed node is remembered, so that nothing older than its end brings it back.
    pub(super) fn tombstone(&self) -> Duration {
        (self.dead_node_timeout * 10).max(Duration::from_mins(5))
    }

    /// A request over the stream is given up after this.
    pub(super) fn stream_timeout(&self) -> Duration {
        self.period() * 5
    }
}
