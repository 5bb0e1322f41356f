//! The core's memory as rows: what a commit writes, and what a start reads.

use std::collections::HashMap;
use std::sync::Arc;

use drover_proto::common::LaunchSpec;
use drover_types::{InjectionId, InjectionState, NodeIndex};
use prost::Message as _;
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::schema::{Place, StoreError};
use crate::core::effects::InboxBody;
use crate::core::input::{Prior, PriorInjection};
use crate::core::model::{Cursor, Head, Injection, Node, NodeFacts, Request, Retry, Stream, Swarm, SwarmKey};
use crate::core::{Core, Restored, StoredControl};

/// Kinds of inbox records that have rows of their own.
const CONTROL_KINDS: &[&str] = &["interrupt", "approval", "shutdown", "keyring"];

/// Name in `meta` of who reported the members last.
const MEMBERS_VIEW: &str = "members_view";

fn json<T: Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}

/// Writes what changed since the last commit; the caller has begun a transaction.
pub(crate) fn write_changes(conn: &Connection, core: &Core) -> rusqlite::Result<()> {
    let dirty = &core.book.dirty;
    for request in &dirty.requests {
        conn.prepare_cached(
            "INSERT INTO requests (key, id, launch, swarm, content, steer, trace, created)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?
        .execute(params![
            request.key,
            &*request.id,
            request.launch,
            request.swarm,
            &*request.content,
            request.steer,
            request.trace,
            request.created.cast_signed(),
        ])?;
    }
    for key in &dirty.swarms {
        let Some(swarm) = core.swarms.get(key) else { continue };
        if swarm.fresh {
            conn.prepare_cached(
                "INSERT INTO swarms (key, id, job, request, spec, facts) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![
                key,
                swarm.head.id.as_str(),
                &*swarm.head.job,
                swarm.request.key,
                swarm.spec.encode_to_vec(),
                json(&swarm.facts)?,
            ])?;
        } else {
            conn.prepare_cached("UPDATE swarms SET job = ?2, facts = ?3 WHERE key = ?1")?.execute(params![
                key,
                &*swarm.head.job,
                json(&swarm.facts)?,
            ])?;
        }
    }
    let node = |key: &SwarmKey, index: u32| core.swarms.get(key).and_then(|swarm| swarm.nodes.get(index as usize));
    for (key, index) in &dirty.nodes {
        if let Some(node) = node(key, *index) {
            conn.prepare_cached(
                "INSERT INTO nodes (swarm, node, facts) VALUES (?1, ?2, ?3)
                 ON CONFLICT DO UPDATE SET facts = excluded.facts",
            )?
            .execute(params![key, index, json(&node.facts)?])?;
        }
    }
    for (key, index, generation) in &dirty.streams {
        if let Some(stream) = node(key, *index).and_then(|node| node.streams.get(generation)) {
            conn.prepare_cached(
                "INSERT OR REPLACE INTO streams (swarm, node, generation, segment, offset, seq, closed, superseded)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            )?
            .execute(params![
                key,
                index,
                generation,
                stream.cursor.segment,
                stream.cursor.offset.cast_signed(),
                stream.cursor.seq.cast_signed(),
                stream.closed,
                stream.superseded.cast_signed(),
            ])?;
        }
    }
    for id in &dirty.injections {
        if let Some(injection) = core.book.injections.get(id) {
            write_injection(conn, id, injection)?;
        }
    }
    for (key, index, seq) in &dirty.controls {
        if let Some(pending) = node(key, *index).and_then(|node| node.queue.iter().find(|pending| pending.seq == *seq))
            && let InboxBody::Control { kind, data } = &pending.body
        {
            conn.prepare_cached(
                "INSERT INTO controls (swarm, node, seq, injection, kind, data) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![
                key,
                index,
                seq.cast_signed(),
                pending.injection.as_ref().map(InjectionId::as_str),
                kind,
                &**data
            ])?;
        }
    }
    for (key, index, seq) in &dirty.controls_done {
        conn.prepare_cached("DELETE FROM controls WHERE swarm = ?1 AND node = ?2 AND seq = ?3")?.execute(params![
            key,
            index,
            seq.cast_signed(),
        ])?;
    }
    for id in &dirty.approvals {
        if let Some(approval) = core.book.approvals.get(id) {
            conn.prepare_cached("INSERT OR REPLACE INTO approvals (id, swarm, facts) VALUES (?1, ?2, ?3)")?
                .execute(params![id, approval.swarm, json(approval)?])?;
        }
    }
    for id in &dirty.approvals_gone {
        conn.prepare_cached("DELETE FROM approvals WHERE id = ?1")?.execute([id])?;
    }
    for key in &dirty.swarms_gone {
        for statement in [
            "DELETE FROM injections WHERE request IN (SELECT key FROM requests WHERE swarm = ?1)",
            "DELETE FROM requests WHERE swarm = ?1",
            "DELETE FROM controls WHERE swarm = ?1",
            "DELETE FROM streams WHERE swarm = ?1",
            "DELETE FROM nodes WHERE swarm = ?1",
            "DELETE FROM approvals WHERE swarm = ?1",
            "DELETE FROM swarms WHERE key = ?1",
        ] {
            conn.prepare_cached(statement)?.execute([key])?;
        }
    }
    for (id, side) in &dirty.leftovers {
        conn.prepare_cached("INSERT OR IGNORE INTO leftovers (swarm_id, side) VALUES (?1, ?2)")?
            .execute([id.as_str(), side])?;
    }
    for id in &dirty.leftovers_gone {
        conn.prepare_cached("DELETE FROM leftovers WHERE swarm_id = ?1")?.execute([id.as_str()])?;
    }
    for id in &dirty.members {
        match core.book.members.get(id) {
            Some(facts) => conn
                .prepare_cached("INSERT OR REPLACE INTO members (id, facts) VALUES (?1, ?2)")?
                .execute(params![id, json(facts)?])?,
            None => conn.prepare_cached("DELETE FROM members WHERE id = ?1")?.execute([id])?,
        };
    }
    if dirty.members_view {
        conn.prepare_cached("INSERT OR REPLACE INTO meta (name, value) VALUES (?1, ?2)")?
            .execute(params![MEMBERS_VIEW, json(&core.book.members_view)?])?;
    }
    Ok(())
}

fn write_injection(conn: &Connection, id: &InjectionId, injection: &Injection) -> rusqlite::Result<()> {
    let numbers = params![
        id.as_str(),
        injection.state.as_str(),
        injection.spoken,
        injection.delivered_seq.cast_signed(),
        injection.end_seq.cast_signed(),
        injection.error,
        injection.assistant_seen,
        injection.last_usage.map(u64::cast_signed),
        injection.since.cast_signed(),
    ];
    if !injection.fresh {
        conn.prepare_cached(
            "UPDATE injections SET state = ?2, spoken = ?3, delivered_seq = ?4, end_seq = ?5, error = ?6,
             assistant_seen = ?7, last_usage = ?8, since = ?9 WHERE id = ?1",
        )?
        .execute(numbers)?;
        return Ok(());
    }
    conn.prepare_cached(
        "INSERT INTO injections (id, state, spoken, delivered_seq, end_seq, error, assistant_seen, last_usage, since,
         swarm, node, request, inbox_seq, ack_seq, created)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
    )?
    .execute(params![
        id.as_str(),
        injection.state.as_str(),
        injection.spoken,
        injection.delivered_seq.cast_signed(),
        injection.end_seq.cast_signed(),
        injection.error,
        injection.assistant_seen,
        injection.last_usage.map(u64::cast_signed),
        injection.since.cast_signed(),
        injection.swarm,
        injection.node.0,
        injection.request.key,
        injection.inbox_seq.cast_signed(),
        injection.ack_seq.cast_signed(),
        injection.created.cast_signed(),
    ])?;
    Ok(())
}

fn read_request(row: &Row<'_>) -> rusqlite::Result<Request> {
    Ok(Request {
        key: row.get("key")?,
        id: row.get::<_, String>("id")?.into(),
        launch: row.get("launch")?,
        swarm: row.get("swarm")?,
        content: row.get::<_, String>("content")?.into(),
        steer: row.get("steer")?,
        trace: row.get("trace")?,
        created: row.get::<_, i64>("created")?.cast_unsigned(),
    })
}

fn read_prior_injection(row: &Row<'_>) -> rusqlite::Result<Option<PriorInjection>> {
    let id: String = row.get("id")?;
    let state: String = row.get("state")?;
    let (Ok(id), Ok(state)) = (id.parse(), state.parse()) else { return Ok(None) };
    Ok(Some(PriorInjection {
        id,
        node: NodeIndex(row.get("node")?),
        state,
        error: row.get("error")?,
        ack_seq: row.get::<_, i64>("ack_seq")?.cast_unsigned(),
        delivered_seq: row.get::<_, i64>("delivered_seq")?.cast_unsigned(),
        end_seq: row.get::<_, i64>("end_seq")?.cast_unsigned(),
    }))
}

/// A request that was taken before, with its injections.
pub(crate) fn prior_request(conn: &Connection, id: &str) -> rusqlite::Result<Option<Prior>> {
    let request =
        conn.prepare_cached("SELECT * FROM requests WHERE id = ?1")?.query_row([id], read_request).optional()?;
    let Some(request) = request else { return Ok(None) };
    let mut select = conn.prepare_cached("SELECT * FROM injections WHERE request = ?1 ORDER BY node")?;
    let found = select.query_map([request.key], read_prior_injection)?.collect::<Result<Vec<_>, _>>()?;
    Ok(Some(Prior { request: Arc::new(request), injections: found.into_iter().flatten().collect() }))
}

/// The request of an injection that was taken before, with only that injection.
pub(crate) fn prior_injection(conn: &Connection, id: &str) -> rusqlite::Result<Option<Prior>> {
    let found = conn
        .prepare_cached("SELECT * FROM injections WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get::<_, i64>("request")?, read_prior_injection(row)?)))
        .optional()?;
    let Some((key, Some(injection))) = found else { return Ok(None) };
    let request = conn.prepare_cached("SELECT * FROM requests WHERE key = ?1")?.query_row([key], read_request)?;
    Ok(Some(Prior { request: Arc::new(request), injections: vec![injection] }))
}

/// An injection by the beginning of its id, with its swarm's key; `None` when there is none or more than one.
pub(crate) fn injection_by_prefix(
    conn: &Connection,
    prefix: &str,
) -> rusqlite::Result<Option<(SwarmKey, PriorInjection)>> {
    // Ids hold no character behind '~', so this is the range of everything that begins so.
    let mut select = conn.prepare_cached("SELECT * FROM injections WHERE id >= ?1 AND id < ?1 || '~' LIMIT 2")?;
    let found = select
        .query_map([prefix], |row| Ok((row.get::<_, i64>("swarm")?, read_prior_injection(row)?)))?
        .collect::<Result<Vec<_>, _>>()?;
    match found.as_slice() {
        [(key, Some(injection))] => Ok(Some((*key, injection.clone()))),
        _ => Ok(None),
    }
}

fn parsed<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// Reads everything that the core keeps in memory.
pub(crate) fn read_all(conn: &Connection, place: &Place) -> Result<Restored, StoreError> {
    let error = place.error("read");
    let error = &error;
    let bad = |table, why: String| StoreError::BadRow { path: place.path.clone(), table, why };
    let number = |sql: &str| conn.query_row(sql, [], |row| row.get::<_, Option<i64>>(0)).map_err(error);
    let mut restored = Restored {
        seq: number("SELECT max(seq) FROM events")?
            .max(number("SELECT max(value) FROM meta WHERE name = 'last_seq'")?)
            .unwrap_or(0)
            .cast_unsigned(),
        next_key: number("SELECT max(key) FROM requests")?.max(number("SELECT max(key) FROM swarms")?).unwrap_or(0),
        ..Restored::default()
    };

    // Only the requests that something in memory refers to.
    let mut requests = HashMap::<i64, Arc<Request>>::new();
    let mut select = conn
        .prepare(
            "SELECT * FROM requests WHERE key IN (SELECT request FROM swarms)
             OR key IN (SELECT request FROM injections WHERE end_seq = 0)",
        )
        .map_err(error)?;
    for request in select.query_map([], read_request).map_err(error)? {
        let request = request.map_err(error)?;
        requests.insert(request.key, Arc::new(request));
    }

    let mut select = conn.prepare("SELECT key, id, job, request, spec, facts FROM swarms").map_err(error)?;
    let mut rows = select.query([]).map_err(error)?;
    while let Some(row) = rows.next().map_err(error)? {
        let text = |column| row.get::<_, String>(column).map_err(error);
        let facts: crate::core::model::SwarmFacts = parsed(&text(5)?).map_err(|why| bad("swarms", why))?;
        let spec: Vec<u8> = row.get(4).map_err(error)?;
        let spec = LaunchSpec::decode(&spec[..]).map_err(|why| bad("swarms", why.to_string()))?;
        let request: i64 = row.get(3).map_err(error)?;
        let request = requests.get(&request).ok_or_else(|| bad("swarms", "its request is missing".to_owned()))?;
        let head = Head {
            key: row.get(0).map_err(error)?,
            id: text(1)?.parse().map_err(|why| bad("swarms", format!("{why}")))?,
            job: text(2)?.into(),
        };
        let nodes = (0..spec.node_count).map(|index| Node { index: NodeIndex(index), ..Node::default() }).collect();
        restored.swarms.push(Swarm {
            head,
            spec: Arc::new(spec),
            request: Arc::clone(request),
            facts,
            nodes,
            ensure: Retry::default(),
            release: Retry::default(),
            fresh: false,
        });
    }

    let mut select = conn.prepare("SELECT swarm, node, facts FROM nodes").map_err(error)?;
    let mut rows = select.query([]).map_err(error)?;
    while let Some(row) = rows.next().map_err(error)? {
        let facts: NodeFacts = parsed(&row.get::<_, String>(2).map_err(error)?).map_err(|why| bad("nodes", why))?;
        restored.nodes.push((row.get(0).map_err(error)?, row.get(1).map_err(error)?, facts));
    }

    let mut select = conn
        .prepare("SELECT swarm, node, generation, segment, offset, seq, closed, superseded FROM streams")
        .map_err(error)?;
    let streams = select
        .query_map([], |row| {
            let cursor = Cursor {
                segment: row.get(3)?,
                offset: row.get::<_, i64>(4)?.cast_unsigned(),
                seq: row.get::<_, i64>(5)?.cast_unsigned(),
            };
            let stream = Stream {
                cursor,
                closed: row.get(6)?,
                superseded: row.get::<_, i64>(7)?.cast_unsigned(),
                asked_again: 0,
            };
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, stream))
        })
        .map_err(error)?;
    restored.streams = streams.collect::<Result<_, _>>().map_err(error)?;

    let mut select = conn.prepare("SELECT * FROM injections WHERE end_seq = 0").map_err(error)?;
    let mut rows = select.query([]).map_err(error)?;
    while let Some(row) = rows.next().map_err(error)? {
        let (id, injection) = read_open(row, &requests)
            .map_err(error)?
            .ok_or_else(|| bad("injections", "its id, state or request is not one".to_owned()))?;
        restored.injections.push((id, injection));
    }

    let mut select = conn.prepare("SELECT swarm, node, seq, injection, kind, data FROM controls").map_err(error)?;
    let mut rows = select.query([]).map_err(error)?;
    while let Some(row) = rows.next().map_err(error)? {
        let kind: String = row.get(4).map_err(error)?;
        let kind = CONTROL_KINDS.iter().find(|known| **known == kind).ok_or_else(|| bad("controls", kind))?;
        let control = StoredControl {
            seq: row.get::<_, i64>(2).map_err(error)?.cast_unsigned(),
            injection: row.get::<_, Option<String>>(3).map_err(error)?.and_then(|id| id.parse().ok()),
            kind,
            data: row.get::<_, String>(5).map_err(error)?.into(),
        };
        restored.controls.push((row.get(0).map_err(error)?, row.get(1).map_err(error)?, control));
    }

    let mut select = conn.prepare("SELECT facts FROM approvals").map_err(error)?;
    for text in select.query_map([], |row| row.get::<_, String>(0)).map_err(error)? {
        restored.approvals.push(parsed(&text.map_err(error)?).map_err(|why| bad("approvals", why))?);
    }
    let mut select = conn.prepare("SELECT swarm_id, side FROM leftovers").map_err(error)?;
    for row in select.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Arc<str>>(1)?))).map_err(error)? {
        let (id, side) = row.map_err(error)?;
        restored.leftovers.extend(id.parse().ok().map(|id| (id, side)));
    }
    let mut select = conn.prepare("SELECT facts FROM members").map_err(error)?;
    for text in select.query_map([], |row| row.get::<_, String>(0)).map_err(error)? {
        restored.members.push(parsed(&text.map_err(error)?).map_err(|why| bad("members", why))?);
    }
    let view = conn
        .query_row("SELECT value FROM meta WHERE name = ?1", [MEMBERS_VIEW], |row| row.get::<_, String>(0))
        .optional()
        .map_err(error)?;
    if let Some(text) = view {
        restored.members_view = parsed(&text).map_err(|why| bad("meta", why))?;
    }
    Ok(restored)
}

fn read_open(
    row: &Row<'_>,
    requests: &HashMap<i64, Arc<Request>>,
) -> rusqlite::Result<Option<(InjectionId, Injection)>> {
    let id: String = row.get("id")?;
    let state: String = row.get("state")?;
    let request: i64 = row.get("request")?;
    let (Ok(id), Ok(state), Some(request)) = (id.parse(), state.parse::<InjectionState>(), requests.get(&request))
    else {
        return Ok(None);
    };
    let number = |column: &str| row.get::<_, i64>(column).map(i64::cast_unsigned);
    let injection = Injection {
        swarm: row.get("swarm")?,
        node: NodeIndex(row.get("node")?),
        request: Arc::clone(request),
        state,
        inbox_seq: number("inbox_seq")?,
        spoken: row.get("spoken")?,
        ack_seq: number("ack_seq")?,
        delivered_seq: number("delivered_seq")?,
        end_seq: 0,
        error: row.get("error")?,
        assistant_seen: row.get("assistant_seen")?,
        last_usage: row.get::<_, Option<i64>>("last_usage")?.map(i64::cast_unsigned),
        created: number("created")?,
        since: number("since")?,
        fresh: false,
    };
    Ok(Some((id, injection)))
}
