//! What `ask` does with a request in plain words: a model plans it, the plan is checked and its price is known before anything is
//! spent on it, the research runs, and the model puts the findings together.
//!
//! The plan is JSON that follows a schema; whatever the model says beside it is not obeyed. A plan decides what is looked for,
//! never who is asked, what it may cost, or what the workers may do.

mod cost;
mod plan;
mod synthesis;

use std::fmt::Write as _;
use std::sync::Arc;

use crate::core::Kind;
use crate::research::{Ask, Finding, Model, Outcome, Request, Told};

pub use cost::{Estimate, Prices, estimate, token_prices};
pub use plan::{MOST_SUBJECTS, Plan, PlanError, SCHEMA, simulated};

/// Most tokens of a plan.
const PLAN_TOKENS: u32 = 1024;
/// Most tokens of the final answer.
pub const SYNTHESIS_TOKENS: u32 = 2048;
/// The longest request that is taken.
pub const MOST_REQUEST_BYTES: usize = 16 * 1024;

/// Plans requests and sums up what was found.
#[derive(Clone)]
pub struct Coordinator {
    model: Arc<dyn Model>,
}

/// A request that could not be planned or summed up.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nothing was asked.
    #[error("the request is empty")]
    Empty,
    /// Too much was asked.
    #[error("the request has {0} bytes, more than {MOST_REQUEST_BYTES}")]
    TooLong(usize),
    /// The model did not answer.
    #[error("the coordinator did not answer: {0}")]
    Model(String),
    /// What it answered is no plan, twice.
    #[error("the coordinator's plan cannot be used: {0}")]
    Plan(#[from] PlanError),
}

/// A plan, and what making it took.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The plan.
    pub plan: Plan,
    /// What was said by whom, and what it cost in all.
    pub told: Told,
}

impl Coordinator {
    /// A coordinator that thinks with this model.
    pub fn new(model: Arc<dyn Model>) -> Self {
        Self { model }
    }

    /// Has a request planned. A plan that does not follow the schema is sent back once, with what is wrong with it.
    pub async fn plan(&self, request: &str) -> Result<Planned, AskError> {
        let request = request.trim();
        if request.is_empty() {
            return Err(AskError::Empty);
        }
        if request.len() > MOST_REQUEST_BYTES {
            return Err(AskError::TooLong(request.len()));
        }
        let mut complaint: Option<PlanError> = None;
        let (mut cost, mut attempts) = (0u128, 0);
        loop {
            let mut prompt = format!("Request:\n{request}\n");
            if let Some(wrong) = &complaint {
                let _ = writeln!(prompt, "\nYour last plan could not be used: {wrong}. Give a corrected one.");
            }
            let id = if complaint.is_none() { "plan" } else { "plan-again" };
            let mut told = self
                .model
                .ask(Ask {
                    id: id.to_owned(),
                    kind: Kind::Extract,
                    system: plan::SYSTEM.to_owned(),
                    prompt,
                    max_tokens: PLAN_TOKENS,
                    schema: Some(SCHEMA.to_owned()),
                })
                .await;
            cost = cost.saturating_add(told.cost_pico_usd);
            attempts += told.attempts;
            let text = match &told.outcome {
                Outcome::Answered(text) => text.clone(),
                Outcome::Blocked(why) => {
                    return Err(AskError::Model(format!("the provider withholds the answer ({why})")));
                }
                Outcome::Failed(why) => return Err(AskError::Model(why.clone())),
            };
            // What only pretends to be a model has no plan of its own, however well it keeps to a schema.
            let read = if told.simulated { simulated(request) } else { Plan::read(&text) };
            match read {
                Ok(plan) => {
                    (told.cost_pico_usd, told.attempts) = (cost, attempts);
                    return Ok(Planned { plan, told });
                }
                Err(wrong) if complaint.is_none() => complaint = Some(wrong),
                Err(wrong) => return Err(wrong.into()),
            }
        }
    }

    /// Puts the findings together into the answer to the request.
    pub async fn synthesize(&self, request: &str, plan: &Plan, findings: &[Finding]) -> Told {
        self.model.ask(synthesis::ask(request, plan, findings)).await
    }
}

impl Plan {
    /// The research that the plan asks for.
    pub fn research(&self) -> Request {
        Request { subjects: self.subjects.clone(), topic: self.topic.clone(), phases: self.phases.clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;

    use super::*;

    /// Says its lines, and remembers what it was asked.
    struct Script {
        lines: Mutex<Vec<Told>>,
        asked: Mutex<Vec<Ask>>,
    }

    #[async_trait]
    impl Model for Script {
        async fn ask(&self, ask: Ask) -> Told {
            self.asked.lock().unwrap().push(ask);
            self.lines.lock().unwrap().remove(0)
        }
    }

    fn says(text: &str) -> Told {
        Told { outcome: Outcome::Answered(text.to_owned()), cost_pico_usd: 10, attempts: 1, ..Told::default() }
    }

    fn script(lines: Vec<Told>) -> Arc<Script> {
        Arc::new(Script { lines: Mutex::new(lines), asked: Mutex::default() })
    }

    const GOOD: &str =
        r#"{"subjects": ["OpenAI", "Anthropic"], "topic": "their products", "synthesis": "compare them"}"#;

    #[tokio::test]
    async fn a_plan_is_sent_back_once_and_both_tries_are_paid_for() {
        let model = script(vec![says("Sure! Here is a plan."), says(GOOD)]);
        let planned = Coordinator::new(Arc::clone(&model) as _).plan(" compare the top 2 AI companies ").await.unwrap();
        assert_eq!(planned.plan.subjects, ["OpenAI", "Anthropic"]);
        assert_eq!((planned.told.cost_pico_usd, planned.told.attempts), (20, 2));
        let asked = std::mem::take(&mut *model.asked.lock().unwrap());
        assert!(asked[0].schema.as_deref() == Some(SCHEMA) && asked[0].prompt.contains("compare the top 2"));
        assert!(asked[1].prompt.contains("could not be used: ") && asked[1].prompt.contains("compare the top 2"));

        let stubborn = script(vec![says("no"), says("{}")]);
        let error = Coordinator::new(stubborn).plan("x").await.unwrap_err();
        assert!(matches!(error, AskError::Plan(_)), "{error}");
        for (line, expected) in
            [(Outcome::Blocked("safety".into()), "withholds"), (Outcome::Failed("no budget".into()), "no budget")]
        {
            let silent = script(vec![Told { outcome: line, ..Told::default() }]);
            let error = Coordinator::new(silent).plan("x").await.unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let unasked = Coordinator::new(script(Vec::new()));
        assert!(matches!(unasked.plan("  ").await, Err(AskError::Empty)));
        assert!(matches!(unasked.plan(&"x".repeat(MOST_REQUEST_BYTES + 1)).await, Err(AskError::TooLong(_))));
    }

    #[tokio::test]
    async fn what_only_pretends_to_think_gets_a_plan_made_of_the_request() {
        let pretends = Told { simulated: true, ..says("simulated answer") };
        let planned = Coordinator::new(script(vec![pretends]))
            .plan("Research the top 5 AI companies and compare their products")
            .await
            .unwrap();
        assert_eq!(planned.plan.subjects.len(), 5);
        assert!(planned.told.simulated);
    }
}
