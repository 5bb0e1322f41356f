//! Plans of many tasks: which may run now, and what each result rests on.
//!
//! A node runs when all that it needs has ended, whatever else of its phase is still under way, so subjects go through their
//! phases independently of each other. A barrier is an explicit node. Results are known by the node and task that they come from and never
//! by their position, so one that is missing moves no other.

use std::collections::{HashMap, VecDeque};

use thiserror::Error;

use super::task::{Kind, TaskId};

/// A node of a graph: its position in the list that the graph was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

/// What becomes of a node when something that it needs did not come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Missing {
    /// It does not run.
    #[default]
    Skip,
    /// It runs with what there is, as long as there is something.
    NeedOne,
    /// It runs all the same, and its result is marked as resting on nothing.
    Proceed,
}

/// A node as it is planned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeSpec {
    /// What a worker does. `None` for a barrier, which ends by itself.
    pub kind: Option<Kind>,
    /// Which subject it is about; `None` for what is about all.
    pub subject: Option<u32>,
    /// Which phase it belongs to.
    pub phase: u16,
    /// Whose results it works on. Only nodes before it.
    pub needs: Vec<NodeId>,
    /// Who must have ended before, whatever came of it. Only nodes before it.
    pub after: Vec<NodeId>,
    /// What becomes of it when something is missing.
    pub missing: Missing,
    /// Its result comes from the world and not from a model: answers that rest on it are grounded.
    pub source: bool,
}

/// What came of a node's task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Yield {
    /// Something.
    Result,
    /// It ran, and there was nothing.
    Nothing,
    /// It failed.
    Failed,
}

/// Where a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeState {
    /// For others.
    Waiting,
    /// Ready to run.
    Ready,
    /// Its task runs.
    Running(TaskId),
    /// Its task has ended.
    Ended(TaskId, Yield),
    /// A barrier that is behind.
    Passed,
    /// It will not run.
    Skipped,
}

/// One thing that a result rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The node.
    pub node: NodeId,
    /// Its subject.
    pub subject: Option<u32>,
    /// Its phase.
    pub phase: u16,
    /// Its task, when it ran.
    pub task: Option<TaskId>,
    /// What came of it; `None` when it did not run.
    pub came: Option<Yield>,
}

/// What a node's result rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// The node.
    pub node: NodeId,
    /// What it is about.
    pub subject: Option<u32>,
    /// All that it needs rests on something that came from the world.
    pub grounded: bool,
    /// What it needs, in the order of the plan, the missing ones included.
    pub sources: Vec<Source>,
}

/// A plan that makes no graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum GraphError {
    /// Plans are lists in which every node comes after what it needs, so they have no circles.
    #[error("node {node} needs node {needs}, which does not come before it")]
    Order {
        /// The node.
        node: u32,
        /// What it needs.
        needs: u32,
    },
    /// Too many nodes to be numbered.
    #[error("a plan has at most {} nodes", u32::MAX)]
    TooLarge,
}

#[derive(Debug)]
struct Node {
    spec: NodeSpec,
    state: NodeState,
    /// How many of those that it waits for have not ended.
    open: u32,
    followers: Vec<NodeId>,
    grounded: bool,
}

/// A plan under way.
#[derive(Debug)]
pub struct Graph {
    nodes: Vec<Node>,
    ready: VecDeque<NodeId>,
    by_task: HashMap<TaskId, NodeId>,
    open: usize,
}

impl Graph {
    /// Nothing of it has run.
    pub fn new(plan: Vec<NodeSpec>) -> Result<Self, GraphError> {
        if u32::try_from(plan.len()).is_err() {
            return Err(GraphError::TooLarge);
        }
        let open = plan.len();
        let mut nodes: Vec<Node> = Vec::with_capacity(plan.len());
        for (index, spec) in plan.into_iter().enumerate() {
            let id = index as u32;
            let before: Vec<NodeId> = spec.needs.iter().chain(&spec.after).copied().collect();
            if let Some(wrong) = before.iter().find(|other| other.0 >= id) {
                return Err(GraphError::Order { node: id, needs: wrong.0 });
            }
            for other in &before {
                nodes[other.0 as usize].followers.push(NodeId(id));
            }
            let state = NodeState::Waiting;
            nodes.push(Node { spec, state, open: before.len() as u32, followers: Vec::new(), grounded: false });
        }
        let mut this = Self { nodes, ready: VecDeque::new(), by_task: HashMap::new(), open };
        let first: Vec<NodeId> =
            (0..open as u32).map(NodeId).filter(|node| this.nodes[node.0 as usize].open == 0).collect();
        this.open_up(first);
        Ok(this)
    }

    /// The next node that can run; it is to be followed by [`Self::started`].
    pub fn next_ready(&mut self) -> Option<NodeId> {
        self.ready.pop_front()
    }

    /// That node's task was submitted.
    pub fn started(&mut self, node: NodeId, task: TaskId) {
        if let Some(entry) = self.nodes.get_mut(node.0 as usize)
            && entry.state == NodeState::Ready
        {
            entry.state = NodeState::Running(task);
            self.by_task.insert(task, node);
        }
    }

    /// That task has ended. Says whose it was; `None` for a task that is not of this graph or was told of before.
    pub fn finished(&mut self, task: TaskId, came: Yield) -> Option<NodeId> {
        let node = self.by_task.remove(&task)?;
        let inputs_grounded = self.inputs_grounded(node);
        let entry = &mut self.nodes[node.0 as usize];
        entry.state = NodeState::Ended(task, came);
        entry.grounded = came == Yield::Result && (entry.spec.source || inputs_grounded);
        self.end(node);
        Some(node)
    }

    /// Ends all that has not ended. The tasks that run are returned, to be cancelled.
    pub fn cancel(&mut self) -> Vec<TaskId> {
        self.ready.clear();
        let mut tasks = Vec::new();
        for node in &mut self.nodes {
            match node.state {
                NodeState::Waiting | NodeState::Ready => node.state = NodeState::Skipped,
                NodeState::Running(task) => {
                    tasks.push(task);
                    node.state = NodeState::Ended(task, Yield::Failed);
                }
                NodeState::Ended(..) | NodeState::Passed | NodeState::Skipped => {}
            }
        }
        self.by_task.clear();
        self.open = 0;
        tasks
    }

    /// Nothing is left to run or to wait for.
    pub fn is_over(&self) -> bool {
        self.open == 0
    }

    /// The plan of a node.
    pub fn spec(&self, node: NodeId) -> Option<&NodeSpec> {
        self.nodes.get(node.0 as usize).map(|node| &node.spec)
    }

    /// Where a node is.
    pub fn state(&self, node: NodeId) -> Option<NodeState> {
        self.nodes.get(node.0 as usize).map(|node| node.state)
    }

    /// Number of nodes, barriers included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// A plan of nothing.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// What a node's result rests on, or would rest on.
    pub fn provenance(&self, node: NodeId) -> Option<Provenance> {
        let entry = self.nodes.get(node.0 as usize)?;
        let sources = entry.spec.needs.iter().map(|&id| {
            let source = &self.nodes[id.0 as usize];
            let (task, came) = match source.state {
                NodeState::Ended(task, came) => (Some(task), Some(came)),
                NodeState::Running(task) => (Some(task), None),
                _ => (None, None),
            };
            Source { node: id, subject: source.spec.subject, phase: source.spec.phase, task, came }
        });
        Some(Provenance {
            node,
            subject: entry.spec.subject,
            grounded: if matches!(entry.state, NodeState::Ended(..)) {
                entry.grounded
            } else {
                self.inputs_grounded(node)
            },
            sources: sources.collect(),
        })
    }

    fn inputs_grounded(&self, node: NodeId) -> bool {
        let needs = &self.nodes[node.0 as usize].spec.needs;
        !needs.is_empty() && needs.iter().all(|need| self.nodes[need.0 as usize].grounded)
    }

    fn end(&mut self, node: NodeId) {
        self.open -= 1;
        let followers = self.nodes[node.0 as usize].followers.clone();
        let mut opened = Vec::new();
        for follower in followers {
            let entry = &mut self.nodes[follower.0 as usize];
            entry.open -= 1;
            if entry.open == 0 && entry.state == NodeState::Waiting {
                opened.push(follower);
            }
        }
        self.open_up(opened);
    }

    /// Nodes that wait for nobody any more become ready, pass, or are skipped, which may open up others.
    fn open_up(&mut self, opened: Vec<NodeId>) {
        for id in opened {
            let entry = &self.nodes[id.0 as usize];
            if entry.spec.kind.is_none() {
                self.nodes[id.0 as usize].state = NodeState::Passed;
                self.end(id);
                continue;
            }
            let came = |need: &&NodeId| matches!(self.nodes[need.0 as usize].state, NodeState::Ended(_, Yield::Result));
            let there = entry.spec.needs.iter().filter(came).count();
            let runs = match entry.spec.missing {
                Missing::Skip => there == entry.spec.needs.len(),
                Missing::NeedOne => there > 0 || entry.spec.needs.is_empty(),
                Missing::Proceed => true,
            };
            if runs {
                self.nodes[id.0 as usize].state = NodeState::Ready;
                self.ready.push_back(id);
            } else {
                self.nodes[id.0 as usize].state = NodeState::Skipped;
                self.end(id);
            }
        }
    }
}

/// A phase of a plan in which every subject goes through the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhaseSpec {
    /// What a worker does.
    pub kind: Kind,
    /// No subject begins it before all have ended the phase before.
    pub barrier: bool,
    /// Its results come from the world.
    pub source: bool,
    /// What becomes of a subject whose result of the phase before is missing.
    pub missing: Missing,
}

/// A plan in which every subject goes through the same phases, and what came of them is put together at the end when
/// `synthesis` is set. A node's subject and phase are in its [`NodeSpec`]; the synthesis is the last one.
pub fn pipeline(subjects: u32, phases: &[PhaseSpec], synthesis: bool) -> Vec<NodeSpec> {
    let mut plan: Vec<NodeSpec> = Vec::new();
    let mut last: Vec<NodeId> = Vec::new();
    for (phase, spec) in phases.iter().enumerate() {
        let phase = phase as u16;
        let mut after = Vec::new();
        if spec.barrier && !last.is_empty() {
            after.push(NodeId(plan.len() as u32));
            plan.push(NodeSpec { phase, after: last.clone(), ..NodeSpec::default() });
        }
        let mut these = Vec::new();
        for subject in 0..subjects {
            these.push(NodeId(plan.len() as u32));
            plan.push(NodeSpec {
                kind: Some(spec.kind),
                subject: Some(subject),
                phase,
                needs: last.get(subject as usize).copied().into_iter().collect(),
                after: after.clone(),
                missing: spec.missing,
                source: spec.source,
            });
        }
        last = these;
    }
    if synthesis {
        plan.push(NodeSpec {
            kind: Some(Kind::Synthesize),
            phase: phases.len() as u16,
            needs: last,
            missing: Missing::NeedOne,
            ..NodeSpec::default()
        });
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEARCH: PhaseSpec = PhaseSpec { kind: Kind::Search, barrier: false, source: true, missing: Missing::Skip };
    const FETCH: PhaseSpec = PhaseSpec { kind: Kind::Fetch, barrier: false, source: true, missing: Missing::Skip };
    const ANALYZE: PhaseSpec =
        PhaseSpec { kind: Kind::Analyze, barrier: false, source: false, missing: Missing::Proceed };

    /// Starts all that is ready; the task of a node has its number.
    fn start_ready(graph: &mut Graph) -> Vec<u32> {
        let mut started = Vec::new();
        while let Some(node) = graph.next_ready() {
            graph.started(node, TaskId(node.0.into()));
            started.push(node.0);
        }
        started
    }

    #[test]
    fn subjects_go_through_their_phases_independently() {
        let mut graph = Graph::new(pipeline(2, &[SEARCH, ANALYZE], true)).unwrap();
        assert_eq!(start_ready(&mut graph), [0, 1]);
        graph.finished(TaskId(1), Yield::Result);
        assert_eq!(start_ready(&mut graph), [3], "the second subject does not wait for the first");
        graph.finished(TaskId(3), Yield::Result);
        assert_eq!(start_ready(&mut graph), [0; 0]);
        graph.finished(TaskId(0), Yield::Result);
        assert_eq!(start_ready(&mut graph), [2]);
        graph.finished(TaskId(2), Yield::Result);
        assert_eq!(start_ready(&mut graph), [4]);
        graph.finished(TaskId(4), Yield::Result);
        assert!(graph.is_over() && graph.provenance(NodeId(4)).unwrap().grounded);
    }

    #[test]
    fn a_barrier_holds_all() {
        let barrier = PhaseSpec { barrier: true, ..ANALYZE };
        let mut graph = Graph::new(pipeline(3, &[SEARCH, barrier], false)).unwrap();
        assert_eq!(start_ready(&mut graph), [0, 1, 2]);
        graph.finished(TaskId(0), Yield::Result);
        graph.finished(TaskId(1), Yield::Failed);
        assert_eq!(start_ready(&mut graph), [0; 0]);
        graph.finished(TaskId(2), Yield::Result);
        assert_eq!(start_ready(&mut graph), [4, 5, 6]);
    }

    #[test]
    fn what_misses_its_source_is_skipped_or_marked() {
        let mut graph = Graph::new(pipeline(2, &[SEARCH, FETCH, ANALYZE], true)).unwrap();
        start_ready(&mut graph);
        graph.finished(TaskId(0), Yield::Nothing);
        assert_eq!(graph.state(NodeId(2)), Some(NodeState::Skipped), "nothing was found, so nothing is fetched");
        assert_eq!(start_ready(&mut graph), [4], "the analysis goes on without");
        graph.finished(TaskId(4), Yield::Result);
        let provenance = graph.provenance(NodeId(4)).unwrap();
        assert!(!provenance.grounded && provenance.subject == Some(0));
        assert_eq!(
            provenance.sources[0],
            Source { node: NodeId(2), subject: Some(0), phase: 1, task: None, came: None }
        );
        graph.finished(TaskId(1), Yield::Result);
        start_ready(&mut graph);
        graph.finished(TaskId(3), Yield::Result);
        start_ready(&mut graph);
        graph.finished(TaskId(5), Yield::Result);
        assert!(graph.provenance(NodeId(5)).unwrap().grounded);
        assert_eq!(start_ready(&mut graph), [6]);
        assert!(!graph.provenance(NodeId(6)).unwrap().grounded, "one of its parts rests on nothing");
        assert_eq!(graph.cancel(), [TaskId(6)]);
        assert!(graph.is_over());
    }

    #[test]
    fn a_plan_whose_order_is_wrong_is_refused() {
        let wrong = NodeSpec { needs: vec![NodeId(0)], ..NodeSpec::default() };
        assert_eq!(Graph::new(vec![wrong]).unwrap_err(), GraphError::Order { node: 0, needs: 0 });
    }
}
