//! Which nodes are to be empty, as people ordered it: one file for each on the file system that all nodes share, so that an order outlives
//! whoever gave it, the node itself, and whoever plans it.
//!
//! ```text
//! <shared>/.orders/<node id with + for />.json    {"node": ..., "at_us": ..., "by": ...}; gone when it is taken back
//! ```

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::core::NodeId;
use crate::files;

/// No session can be called that.
const DIR: &str = ".orders";
/// An order is far smaller.
const MAX_BYTES: u64 = 4096;

/// An order to empty a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    /// The node that is to be empty.
    pub(crate) node: NodeId,
    /// Since when, in microseconds of Unix time.
    pub(crate) at_us: u64,
    /// The door through which it came.
    pub(crate) by: NodeId,
}

/// All of them. Blocks.
#[derive(Debug, Clone)]
pub(crate) struct Orders {
    dir: PathBuf,
}

fn name(node: &NodeId) -> Option<String> {
    let name = node.as_str().replace('/', "+");
    let harmless = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    (!name.is_empty() && !name.starts_with('.') && name.len() < 200 && name.chars().all(harmless))
        .then(|| format!("{name}.json"))
}

impl Orders {
    pub(crate) fn new(shared: &Path) -> Self {
        Self { dir: shared.join(DIR) }
    }

    /// Has it stand until it is taken back. Safe to repeat.
    pub(crate) fn give(&self, order: &Order) -> io::Result<()> {
        let name = name(&order.node).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no name of a node"))?;
        files::make_dir(&self.dir)?;
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        files::replace(&self.dir, &name, &line)
    }

    /// Takes it back.
    pub(crate) fn take_back(&self, node: &NodeId) -> io::Result<()> {
        let Some(name) = name(node) else { return Ok(()) };
        files::remove(&self.dir.join(name))
    }

    /// The order for a node.
    pub(crate) fn of(&self, node: &NodeId) -> Option<Order> {
        self.read(&name(node)?).filter(|order| order.node == *node)
    }

    /// Every order that stands.
    pub(crate) fn all(&self) -> Vec<Order> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let orders = names.filter(|name| !name.starts_with('.')).filter_map(|name| {
            let order = self.read(&name)?;
            (self::name(&order.node).as_deref() == Some(&name)).then_some(order)
        });
        orders.collect()
    }

    fn read(&self, name: &str) -> Option<Order> {
        let path = self.dir.join(name);
        let order = files::read_small(&path, MAX_BYTES).and_then(|bytes| {
            let parse = |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(io::Error::from);
            bytes.map(parse).transpose()
        });
        order.unwrap_or_else(|error| {
            warn!(path = %path.display(), %error, "what stands among the orders is none");
            None
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_stands_until_it_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let orders = Orders::new(dir.path());
        let order = |node: &str| Order { node: NodeId::new(node), at_us: 1, by: NodeId::new("s/9") };
        assert_eq!(orders.all(), []);
        orders.give(&order("s/0")).unwrap();
        orders.give(&Order { at_us: 2, ..order("s/0") }).unwrap();
        orders.give(&order("lab-1")).unwrap();
        assert_eq!(orders.of(&NodeId::new("s/0")).unwrap().at_us, 2);
        assert_eq!(orders.all().len(), 2);
        assert!(orders.give(&order("../x")).is_err() && orders.give(&order("")).is_err());
        // What others put there is no order, and hinders none.
        std::fs::write(dir.path().join(".orders/s+1.json"), "{").unwrap();
        std::fs::write(dir.path().join(".orders/s+2.json"), r#"{"node":"s/3","at_us":1,"by":"x"}"#).unwrap();
        assert_eq!((orders.all().len(), orders.of(&NodeId::new("s/2"))), (2, None));
        orders.take_back(&NodeId::new("s/0")).unwrap();
        orders.take_back(&NodeId::new("s/0")).unwrap();
        assert_eq!(orders.of(&NodeId::new("s/0")), None);
    }
}
