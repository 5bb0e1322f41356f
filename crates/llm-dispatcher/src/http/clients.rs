//! Who a request comes from, for fair shares: whoever names itself is one client, all others are one together.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::HeaderMap;

use crate::core::Priority;
use crate::shell::{Client, Pool};

/// Most clients with a name. Beyond it names count as none, so that names cannot fill the memory.
const MOST: usize = 4096;
/// Longest name.
const LONGEST: usize = 128;
/// The header by which a program names itself.
const NAME: &str = "x-drover-client";
/// The header by which it says how urgent a request is: `low`, `normal` or `high`.
const PRIORITY: &str = "x-drover-priority";

/// All clients.
#[derive(Debug)]
pub(super) struct Clients {
    pool: Pool,
    unnamed: Arc<Client>,
    named: Mutex<HashMap<String, Arc<Client>>>,
}

impl Clients {
    pub(super) fn new(pool: &Pool) -> Self {
        Self { pool: pool.clone(), unnamed: Arc::new(pool.client(1)), named: Mutex::default() }
    }

    /// The client of a request: its header, or else the user that the request is made for.
    pub(super) fn of(&self, headers: &HeaderMap, user: Option<&str>) -> Arc<Client> {
        let name = headers.get(NAME).and_then(|value| value.to_str().ok()).or(user).unwrap_or_default();
        if name.is_empty() || name.len() > LONGEST {
            return Arc::clone(&self.unnamed);
        }
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = named.get(name) {
            return Arc::clone(client);
        }
        if named.len() >= MOST {
            // Those who are not here at the moment are forgotten; their share starts afresh.
            named.retain(|_, client| Arc::strong_count(client) > 1);
        }
        if named.len() >= MOST {
            return Arc::clone(&self.unnamed);
        }
        let client = Arc::new(self.pool.client(1));
        named.insert(name.to_owned(), Arc::clone(&client));
        client
    }
}

/// How urgent a request says it is.
pub(super) fn priority(headers: &HeaderMap) -> Priority {
    match headers.get(PRIORITY).map(axum::http::HeaderValue::as_bytes) {
        Some(b"low") => Priority::Low,
        Some(b"high") => Priority::High,
        _ => Priority::Normal,
    }
}
