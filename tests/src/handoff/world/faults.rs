//! What is done to the nodes, and how it ends.

use std::time::Duration;

use drover_handoff::core::{Engine, Input, Own};

use super::parts::{Happening, Process};
use super::{Fault, Weather, World};

impl World {
    /// Kills a process; it starts again after a while.
    pub fn kill(&mut self, node: usize, back: Duration) {
        let slot = &mut self.nodes[node];
        if slot.process == Process::Killed {
            return;
        }
        slot.process = Process::Killed;
        slot.killed_at = self.now;
        slot.waiting.clear();
        slot.agents.clear();
        let owner = slot.engine.me().clone();
        // What it knew is gone with it.
        slot.engine = Engine::new(self.now, owner.clone(), self.settings.clone(), 0);
        self.judge.killed(&owner);
        self.say(|| format!("{owner} is killed"));
        self.schedule(back, Happening::Start { node });
        self.schedule(Duration::from_secs(1), Happening::Believed { node });
    }

    /// Stops a process for a while; what comes for it waits.
    pub fn pause(&mut self, node: usize, span: Duration) {
        let slot = &mut self.nodes[node];
        if slot.process == Process::Running {
            slot.process = Process::Stopped;
            let start = slot.start;
            self.say(|| format!("node {node} is stopped for {span:?}"));
            self.schedule(span, Happening::Wake { node, start });
        }
    }

    /// Cuts one node off from another, in one direction.
    pub fn cut(&mut self, from: usize, to: usize, span: Duration) {
        self.say(|| format!("{from} does not reach {to} for {span:?}"));
        self.cut.insert((from, to));
        self.schedule(span, Happening::Joined { a: from, b: to });
    }

    /// Cuts a node off from the shared file system.
    pub fn cut_off_files(&mut self, node: usize, span: Duration) {
        self.say(|| format!("{node} does not reach the files for {span:?}"));
        self.unreachable.insert(node);
        self.schedule(span, Happening::Reached { node });
    }

    /// Everybody takes a node that lives for gone.
    pub fn slander(&mut self, node: usize, span: Duration) {
        self.nodes[node].believed_gone = true;
        self.tell_peers();
        self.schedule(span, Happening::Believed { node });
    }

    /// Sets what a node says of its load.
    pub fn load(&mut self, node: usize, load: f64) {
        self.nodes[node].load = load;
        if self.nodes[node].process == Process::Running {
            let own = Own { load, leaving: false, capabilities: ["echo".to_owned()].into() };
            self.feed(node, Input::Own(own));
        }
        self.tell_peers();
    }

    pub(super) fn strike(&mut self, node: usize, fault: Fault) {
        let span = Duration::from_secs(10);
        match fault {
            Fault::Kill => self.kill(node, Duration::from_secs(2)),
            Fault::KillForLong => self.kill(node, Duration::from_mins(1)),
            Fault::Stop => self.pause(node, Duration::from_mins(1)),
            Fault::Cut | Fault::Deaf => {
                for other in (0..self.nodes.len()).filter(|other| *other != node) {
                    self.cut(other, node, span);
                    if fault == Fault::Cut {
                        self.cut(node, other, span);
                    }
                }
            }
            Fault::NoFiles => self.cut_off_files(node, span),
            Fault::Slander => self.slander(node, span),
        }
    }

    /// From now on nothing goes wrong, and what was killed or stopped or cut is back.
    pub fn heal(&mut self) {
        self.weather = Weather::FAIR;
        self.fault = None;
        self.cut.clear();
        self.unreachable.clear();
        for node in 0..self.nodes.len() {
            self.nodes[node].believed_gone = false;
            let start = self.nodes[node].start;
            match self.nodes[node].process {
                Process::Killed => self.start(node),
                Process::Stopped => self.wake(node, start),
                Process::Running => {}
            }
        }
        self.tell_peers();
    }
}
