//! Questions and answers of the election.
//!
//! ```text
//! request = seat var | kind u8 | fields | charter?        reply = ballot | seat var | ballot promised | kind u8 | fields | set? | charter?
//! ballot  = epoch var | term var      version = ballot | generation var     x? = 0 | 1 x
//! set     = version | voters | voters voters = count var | (key 8 | seat var)*
//! charter = length var | bytes | length var | signature
//! ```

use std::time::Duration;

use super::buf::{Put, Reader, WireError};
use crate::core::NodeKey;
use crate::core::lease::{
    Ask, Ballot, Known, MAX_VOTERS, Outcome, Refusal, Reply, Request, SetVersion, SignedCharter, Voter, VoterSet,
};

/// The longest charter: a voter takes 16 bytes.
const MAX_CHARTER: usize = 16 + 16 * MAX_VOTERS;
/// The longest signature.
const MAX_SIGNATURE: usize = 64;

/// Appends a question.
pub fn encode_request(request: &Request, out: &mut Vec<u8>) {
    out.put_varint(request.seat);
    match &request.ask {
        Ask::Probe { ballot, boot, version } => put_candidate(0, *ballot, *boot, *version, out),
        Ask::Vote { ballot, boot, version } => put_candidate(1, *ballot, *boot, *version, out),
        Ask::Renew { ballot, boot, seq, set } => {
            out.push(2);
            put_ballot(*ballot, out);
            out.put_varint(*boot);
            out.put_varint(*seq);
            put_set(set.as_ref(), out);
        }
        Ask::Release { ballot, boot, set } => {
            out.push(3);
            put_ballot(*ballot, out);
            out.put_varint(*boot);
            put_set(set.as_ref(), out);
        }
        Ask::Invite => out.push(4),
        Ask::Who => out.push(5),
    }
    put_charter(request.charter.as_ref(), out);
}

/// Reads a question.
pub fn decode_request(bytes: &[u8]) -> Result<Request, WireError> {
    let mut reader = Reader::new(bytes);
    let r = &mut reader;
    let seat = r.varint()?;
    let ask = match r.u8()? {
        0 => Ask::Probe { ballot: ballot(r)?, boot: r.varint()?, version: version(r)? },
        1 => Ask::Vote { ballot: ballot(r)?, boot: r.varint()?, version: version(r)? },
        2 => Ask::Renew { ballot: ballot(r)?, boot: r.varint()?, seq: r.varint()?, set: set(r)? },
        3 => Ask::Release { ballot: ballot(r)?, boot: r.varint()?, set: set(r)? },
        4 => Ask::Invite,
        5 => Ask::Who,
        _ => return Err(WireError::Invalid("question")),
    };
    let request = Request { seat, ask, charter: charter(r)? };
    reader.end()?;
    Ok(request)
}

/// Appends an answer.
pub fn encode_reply(reply: &Reply, out: &mut Vec<u8>) {
    put_ballot(reply.ballot, out);
    out.put_varint(reply.seat);
    put_ballot(reply.promised, out);
    match &reply.outcome {
        Outcome::Would => out.push(0),
        Outcome::Voted => out.push(1),
        Outcome::Granted { seq, version } => {
            out.push(2);
            out.put_varint(*seq);
            put_version(*version, out);
        }
        Outcome::Released => out.push(3),
        Outcome::Willing => out.push(4),
        Outcome::Knows(known) => {
            out.push(5);
            put_option(known.leader.is_some(), out);
            if let Some((leader, ballot)) = known.leader {
                out.put_fixed64(leader.0);
                put_ballot(ballot, out);
            }
            put_span(known.left, out);
        }
        Outcome::Refused(refusal) => {
            out.push(6);
            match refusal {
                Refusal::OtherSeat => out.push(0),
                Refusal::OldBallot => out.push(1),
                Refusal::Voted => out.push(2),
                Refusal::LeaseRuns(left) => {
                    out.push(3);
                    put_span(*left, out);
                }
                Refusal::OldSet => out.push(4),
                Refusal::NoCharter => out.push(5),
                Refusal::Leaving => out.push(6),
                Refusal::Nonsense => out.push(7),
            }
        }
    }
    put_set(reply.set.as_ref(), out);
    put_charter(reply.charter.as_ref(), out);
}

/// Reads an answer.
pub fn decode_reply(bytes: &[u8]) -> Result<Reply, WireError> {
    let mut reader = Reader::new(bytes);
    let r = &mut reader;
    let (of, seat, promised) = (ballot(r)?, r.varint()?, ballot(r)?);
    let outcome = match r.u8()? {
        0 => Outcome::Would,
        1 => Outcome::Voted,
        2 => Outcome::Granted { seq: r.varint()?, version: version(r)? },
        3 => Outcome::Released,
        4 => Outcome::Willing,
        5 => {
            let leader = if r.flag("option")? { Some((NodeKey(r.fixed64()?), ballot(r)?)) } else { None };
            Outcome::Knows(Known { leader, left: span(r)? })
        }
        6 => Outcome::Refused(match r.u8()? {
            0 => Refusal::OtherSeat,
            1 => Refusal::OldBallot,
            2 => Refusal::Voted,
            3 => Refusal::LeaseRuns(span(r)?),
            4 => Refusal::OldSet,
            5 => Refusal::NoCharter,
            6 => Refusal::Leaving,
            7 => Refusal::Nonsense,
            _ => return Err(WireError::Invalid("refusal")),
        }),
        _ => return Err(WireError::Invalid("answer")),
    };
    let reply = Reply { ballot: of, seat, promised, outcome, set: set(r)?, charter: charter(r)? };
    reader.end()?;
    Ok(reply)
}

fn put_candidate(kind: u8, ballot: Ballot, boot: u64, version: SetVersion, out: &mut Vec<u8>) {
    out.push(kind);
    put_ballot(ballot, out);
    out.put_varint(boot);
    put_version(version, out);
}

fn put_option(there: bool, out: &mut Vec<u8>) {
    out.push(u8::from(there));
}

/// In microseconds.
fn put_span(span: Duration, out: &mut Vec<u8>) {
    out.put_varint(u64::try_from(span.as_micros()).unwrap_or(u64::MAX));
}

fn span(reader: &mut Reader<'_>) -> Result<Duration, WireError> {
    reader.varint().map(Duration::from_micros)
}

fn put_ballot(ballot: Ballot, out: &mut Vec<u8>) {
    out.put_varint(ballot.epoch);
    out.put_varint(ballot.term);
}

fn ballot(reader: &mut Reader<'_>) -> Result<Ballot, WireError> {
    Ok(Ballot { epoch: reader.varint()?, term: reader.varint()? })
}

fn put_version(version: SetVersion, out: &mut Vec<u8>) {
    put_ballot(version.ballot, out);
    out.put_varint(version.generation);
}

fn version(reader: &mut Reader<'_>) -> Result<SetVersion, WireError> {
    Ok(SetVersion { ballot: ballot(reader)?, generation: reader.varint()? })
}

fn put_set(set: Option<&VoterSet>, out: &mut Vec<u8>) {
    put_option(set.is_some(), out);
    let Some(set) = set else { return };
    put_version(set.version, out);
    for group in [&set.voters, &set.old] {
        out.put_varint(group.len() as u64);
        for voter in group {
            out.put_fixed64(voter.key.0);
            out.put_varint(voter.seat);
        }
    }
}

fn set(reader: &mut Reader<'_>) -> Result<Option<VoterSet>, WireError> {
    if !reader.flag("option")? {
        return Ok(None);
    }
    Ok(Some(VoterSet { version: version(reader)?, voters: voters(reader)?, old: voters(reader)? }))
}

fn voters(reader: &mut Reader<'_>) -> Result<Vec<Voter>, WireError> {
    let count = reader.count(MAX_VOTERS, "list of voters")?;
    (0..count).map(|_| Ok(Voter { key: NodeKey(reader.fixed64()?), seat: reader.varint()? })).collect()
}

fn put_charter(charter: Option<&SignedCharter>, out: &mut Vec<u8>) {
    put_option(charter.is_some(), out);
    let Some(charter) = charter else { return };
    out.put_bytes(&charter.bytes);
    out.put_bytes(&charter.signature);
}

fn charter(reader: &mut Reader<'_>) -> Result<Option<SignedCharter>, WireError> {
    if !reader.flag("option")? {
        return Ok(None);
    }
    let bytes = reader.bytes(MAX_CHARTER, "charter")?.into();
    Ok(Some(SignedCharter { bytes, signature: reader.bytes(MAX_SIGNATURE, "signature")?.into() }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ballots() -> impl Strategy<Value = Ballot> {
        any::<(u64, u64)>().prop_map(|(epoch, term)| Ballot { epoch, term })
    }

    fn versions() -> impl Strategy<Value = SetVersion> {
        (ballots(), any::<u64>()).prop_map(|(ballot, generation)| SetVersion { ballot, generation })
    }

    fn sets() -> impl Strategy<Value = Option<VoterSet>> {
        let group = || {
            let voter = any::<(u64, u64)>().prop_map(|(key, seat)| Voter { key: NodeKey(key), seat });
            proptest::collection::vec(voter, 0..=MAX_VOTERS)
        };
        proptest::option::of((versions(), group(), group()).prop_map(|(version, voters, old)| VoterSet {
            version,
            voters,
            old,
        }))
    }

    fn charters() -> impl Strategy<Value = Option<SignedCharter>> {
        let bytes = |most| proptest::collection::vec(any::<u8>(), 0..=most);
        proptest::option::of(
            (bytes(MAX_CHARTER), bytes(MAX_SIGNATURE))
                .prop_map(|(bytes, signature)| SignedCharter { bytes: bytes.into(), signature: signature.into() }),
        )
    }

    fn requests() -> impl Strategy<Value = Request> {
        let ask = prop_oneof![
            (ballots(), any::<u64>(), versions()).prop_map(|(ballot, boot, version)| Ask::Probe {
                ballot,
                boot,
                version
            }),
            (ballots(), any::<u64>(), versions()).prop_map(|(ballot, boot, version)| Ask::Vote {
                ballot,
                boot,
                version
            }),
            (ballots(), any::<(u64, u64)>(), sets()).prop_map(|(ballot, (boot, seq), set)| Ask::Renew {
                ballot,
                boot,
                seq,
                set
            }),
            (ballots(), any::<u64>(), sets()).prop_map(|(ballot, boot, set)| Ask::Release { ballot, boot, set }),
            Just(Ask::Invite),
            Just(Ask::Who),
        ];
        (any::<u64>(), ask, charters()).prop_map(|(seat, ask, charter)| Request { seat, ask, charter })
    }

    fn replies() -> impl Strategy<Value = Reply> {
        let known = (proptest::option::of((any::<u64>().prop_map(NodeKey), ballots())), any::<u64>())
            .prop_map(|(leader, left)| Outcome::Knows(Known { leader, left: Duration::from_micros(left) }));
        let refusal = prop_oneof![
            any::<u64>().prop_map(|left| Refusal::LeaseRuns(Duration::from_micros(left))),
            Just(Refusal::OtherSeat),
            Just(Refusal::OldBallot),
            Just(Refusal::Voted),
            Just(Refusal::OldSet),
            Just(Refusal::NoCharter),
            Just(Refusal::Leaving),
            Just(Refusal::Nonsense),
        ];
        let outcome = prop_oneof![
            Just(Outcome::Would),
            Just(Outcome::Voted),
            (any::<u64>(), versions()).prop_map(|(seq, version)| Outcome::Granted { seq, version }),
            Just(Outcome::Released),
            Just(Outcome::Willing),
            known,
            refusal.prop_map(Outcome::Refused),
        ];
        let head = (ballots(), any::<u64>(), ballots());
        (head, outcome, sets(), charters()).prop_map(|((ballot, seat, promised), outcome, set, charter)| Reply {
            ballot,
            seat,
            promised,
            outcome,
            set,
            charter,
        })
    }

    proptest! {
        #[test]
        fn questions_and_answers_come_back_as_they_were(request in requests(), reply in replies(), cut in any::<usize>()) {
            let (mut question, mut answer) = (Vec::new(), Vec::new());
            encode_request(&request, &mut question);
            encode_reply(&reply, &mut answer);
            prop_assert!(decode_request(&question[..cut % question.len()]).is_err());
            prop_assert!(decode_reply(&answer[..cut % answer.len()]).is_err());
            prop_assert_eq!(decode_request(&question), Ok(request));
            prop_assert_eq!(decode_reply(&answer), Ok(reply));
        }

        #[test]
        fn any_bytes_are_taken_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = (decode_request(&bytes), decode_reply(&bytes));
        }
    }
}
