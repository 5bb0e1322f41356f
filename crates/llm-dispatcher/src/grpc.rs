//! What operators and programs of this host ask for. Whoever is not the owner needs the role `dispatch`; runs, and who began them,
//! are written down.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use drover_proto::dispatch as pb;
use drover_proto::dispatch::dispatch_service_server::{DispatchService, DispatchServiceServer};
use drover_proto::status_of;
use drover_service::guard::{Guard, Needs, Role, put};
use drover_service::{Caller, Context, MAX_MESSAGE_BYTES, now_us};
use drover_types::{ErrorCode, Failure};
use futures::stream::BoxStream;
use serde_json::Map;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::core::Money;
use crate::errands::Errands;
use crate::ledger::{Ledger, SpentDay};
use crate::metrics::Metrics;
use crate::session;
use crate::settings::Settings;
use crate::shell::Pool;

/// Messages that may wait for a reader.
const READER_QUEUE: usize = 16;
/// Days of spending that are shown unless others are asked for.
const DAYS: u32 = 7;
/// Runs that are listed unless others are asked for.
const RUNS: u32 = 20;

type Answer<T> = Result<Response<T>, Status>;

/// What every call of the service needs.
pub(crate) struct Service {
    pub(crate) ctx: Context,
    pub(crate) pool: Pool,
    pub(crate) ledger: Ledger,
    pub(crate) settings: Settings,
    pub(crate) errands: Errands,
    pub(crate) metrics: Metrics,
    /// Runs under way, by name.
    running: Mutex<BTreeMap<String, CancellationToken>>,
}

impl Service {
    pub(crate) fn new(
        ctx: &Context,
        pool: Pool,
        ledger: Ledger,
        settings: Settings,
        errands: Errands,
        metrics: Metrics,
    ) -> Arc<Self> {
        Arc::new(Self { ctx: ctx.clone(), pool, ledger, settings, errands, metrics, running: Mutex::default() })
    }

    pub(crate) fn runs(&self) -> MutexGuard<'_, BTreeMap<String, CancellationToken>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses when dispatching is switched off.
    pub(crate) fn may_dispatch(&self) -> Result<(), Failure> {
        if self.settings.scaling.enabled {
            return Ok(());
        }
        Err(Failure::new(ErrorCode::NotAllowed, "dispatching is switched off")
            .hint("node_scaling.enabled is false in the configuration; set it to true and restart the dispatcher"))
    }
}

const DISPATCH: Needs = Needs::OneOf(&[Role::Dispatch]);

/// The gRPC service.
#[derive(Clone)]
pub(crate) struct Door {
    service: Arc<Service>,
    guard: Arc<Guard>,
}

impl Door {
    pub(crate) fn service(service: &Arc<Service>, guard: &Arc<Guard>) -> DispatchServiceServer<Self> {
        DispatchServiceServer::new(Self { service: Arc::clone(service), guard: Arc::clone(guard) })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Whose call it is, if they may.
    fn admit<T>(&self, call: &'static str, request: &Request<T>) -> Result<Caller, Status> {
        let checked = self.guard.check(request.extensions(), request.metadata(), DISPATCH);
        checked.map_err(|refused| status_of(&self.guard.refuse(refused, call, &Map::new())))
    }
}

fn pico(amount: Money) -> u64 {
    u64::try_from(amount.pico()).unwrap_or(u64::MAX)
}

#[tonic::async_trait]
impl DispatchService for Door {
    type DispatchStream = BoxStream<'static, Result<pb::DispatchResponse, Status>>;

    async fn dispatch(&self, request: Request<Streaming<pb::DispatchRequest>>) -> Answer<Self::DispatchStream> {
        let scribe = session::Scribe { guard: Arc::clone(&self.guard), caller: self.admit("dispatch", &request)? };
        let (tell, told) = mpsc::channel(READER_QUEUE);
        self.service.ctx.spawn("run", session::serve(Arc::clone(&self.service), scribe, request.into_inner(), tell));
        Ok(Response::new(Box::pin(ReceiverStream::new(told))))
    }

    async fn get_status(&self, request: Request<pb::GetStatusRequest>) -> Answer<pb::GetStatusResponse> {
        self.admit("get_status", &request)?;
        let service = &self.service;
        let Some(snapshot) = service.pool.snapshot().await else {
            return Err(status_of(&Failure::new(ErrorCode::ShuttingDown, "the dispatcher is stopping")));
        };
        let lanes = snapshot.lanes.into_iter().map(|seen| pb::Lane {
            provider: seen.lane.name.clone(),
            model: seen.lane.model.clone(),
            simulated: seen.lane.simulated(),
            under_way: seen.under_way,
            width: seen.width,
            breaker: seen.breaker.to_owned(),
            priced: seen.lane.price.is_some(),
            unusable: seen.lane.unusable.clone().unwrap_or_default(),
        });
        let limits = &service.settings.scaling.limits;
        Ok(Response::new(pb::GetStatusResponse {
            version: drover_types::VERSION.to_owned(),
            config: service.settings.source.clone().unwrap_or_else(|| "built in".to_owned()),
            enabled: service.settings.scaling.enabled,
            queued: snapshot.queued,
            under_way: snapshot.under_way,
            max_nodes: limits.max_nodes,
            max_concurrent_api: limits.max_concurrent_api,
            lanes: lanes.collect(),
            notes: snapshot.notes.into_iter().map(session::note_of).collect(),
            calls: snapshot.calls,
            runs: service.runs().keys().cloned().collect(),
        }))
    }

    async fn get_spend(&self, request: Request<pb::GetSpendRequest>) -> Answer<pb::GetSpendResponse> {
        self.admit("get_spend", &request)?;
        let service = &self.service;
        let days = match request.into_inner().days {
            0 => DAYS,
            days => days,
        };
        let today = service.settings.zone.day(now_us());
        let failed = |error| status_of(&session::failure_of(&error));
        let spent = service.ledger.spent(days).await.map_err(failed)?;
        let counted = service.ledger.counted(today).await.map_err(failed)?;
        let cost = &service.settings.scaling.cost;
        Ok(Response::new(pb::GetSpendResponse {
            days: spent.into_iter().map(day_message).collect(),
            today: today.to_string(),
            cap_pico_usd: cost.max_daily_spend.and_then(Money::from_usd).map(pico),
            counted_pico_usd: pico(counted),
            timezone: cost.timezone.clone().unwrap_or_else(|| "UTC".to_owned()),
        }))
    }

    async fn list_runs(&self, request: Request<pb::ListRunsRequest>) -> Answer<pb::ListRunsResponse> {
        self.admit("list_runs", &request)?;
        let most = match request.into_inner().most {
            0 => RUNS,
            most => most,
        };
        let runs = self.service.ledger.runs(most).await.map_err(|error| status_of(&session::failure_of(&error)))?;
        let runs = runs.into_iter().map(|run| pb::Run {
            run_id: run.name,
            source: run.source,
            began_ms: run.began_ms,
            ended_ms: run.ended_ms,
            answered: run.answered,
        });
        Ok(Response::new(pb::ListRunsResponse { runs: runs.collect() }))
    }

    async fn cancel(&self, request: Request<pb::CancelRequest>) -> Answer<pb::CancelResponse> {
        let caller = self.admit("cancel", &request)?;
        let name = request.into_inner().run_id;
        let mut asked = Map::new();
        put(&mut asked, "run_id", &name);
        let taken = self.guard.take(&caller, "cancel", &asked).await.map_err(|why| status_of(&why))?;
        let was_running = self.service.runs().get(&name).map(CancellationToken::cancel).is_some();
        // A name that nobody knows is a mistake, and a run that is over is none.
        let known = if was_running { Ok(()) } else { self.service.ledger.find(name).await.map(drop) };
        let known = known.map_err(|error| session::failure_of(&error));
        taken.answered(known.as_ref().err().map(|failure| failure.code), Map::new()).await;
        known.map_err(|failure| status_of(&failure))?;
        Ok(Response::new(pb::CancelResponse { was_running }))
    }
}

fn day_message(day: SpentDay) -> pb::SpentDay {
    let spent = day.spent.into_iter().map(|line| pb::SpentOn {
        provider: line.provider,
        model: line.model,
        calls: line.calls,
        input_tokens: line.input_tokens,
        output_tokens: line.output_tokens,
        cost_pico_usd: pico(line.cost),
        estimated_pico_usd: pico(line.estimated),
    });
    pb::SpentDay { day: day.day, spent: spent.collect(), set_aside_pico_usd: pico(day.set_aside) }
}
