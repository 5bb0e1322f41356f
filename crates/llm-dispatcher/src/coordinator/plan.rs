//! The plan of a request: about whom, what, in which phases, and to what end. What a model says is checked against the schema before anybody
//! acts on it.

use serde::{Deserialize, Serialize};

use crate::research::{Phase, check, usual};

/// More subjects in one request are a mistake, or an attempt to spend somebody's money.
pub const MOST_SUBJECTS: usize = 50;
const LONGEST_SUBJECT: usize = 200;
const LONGEST_TEXT: usize = 1000;

/// What the planning model is told.
pub(super) const SYSTEM: &str = "You plan research. Given a request, name the subjects that have to be looked up one by one, the \
    topic that is to be found out about each, and how the findings are to be put together. Use concrete names that a search engine \
    understands. Each subject goes through phases of its own: search (its prompt is what to search for beside the subject), fetch (reads \
    the best page), extract (a model takes from it what the prompt says), analyze (a model answers the prompt); the usual ones are \
    search, fetch, analyze. A phase waits for all subjects only where barrier is true, which is seldom needed. Answer with one JSON \
    object: {\"subjects\": [\"...\"], \"topic\": \"...\", \"phases\": [{\"kind\": \"search\", \"prompt\": \"\", \"barrier\": false}, \
    ...], \"synthesis\": \"...\"} and nothing else.";

/// The schema that a plan follows, as the providers take it.
pub const SCHEMA: &str = r#"{"type":"object","additionalProperties":false,"required":["subjects","topic","synthesis"],"properties":{"subjects":{"type":"array","minItems":1,"maxItems":50,"items":{"type":"string","minLength":1,"maxLength":200}},"topic":{"type":"string","maxLength":1000},"phases":{"type":"array","minItems":1,"maxItems":6,"items":{"type":"object","additionalProperties":false,"required":["kind"],"properties":{"kind":{"type":"string","enum":["search","fetch","extract","analyze"]},"prompt":{"type":"string","maxLength":1000},"barrier":{"type":"boolean"}}}},"synthesis":{"type":"string","maxLength":1000}}}"#;

/// A plan that was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// About whom or what, each on its own.
    pub subjects: Vec<String>,
    /// What about them; may be empty.
    pub topic: String,
    /// What becomes of each subject; the usual ones when the plan does not say.
    #[serde(default = "usual")]
    pub phases: Vec<Phase>,
    /// How the findings are to be put together.
    pub synthesis: String,
}

/// What is wrong with a plan. The model reads it too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// It does not follow the schema.
    #[error("it is not a JSON object of the asked shape: {0}")]
    Shape(String),
    /// Nothing to look up.
    #[error("it names no subjects")]
    NoSubjects,
    /// Too much to look up.
    #[error("it names {0} subjects, more than {MOST_SUBJECTS}")]
    TooMany(usize),
    /// A subject that is none.
    #[error("subject {0} is empty or longer than {LONGEST_SUBJECT} characters")]
    Subject(usize),
    /// Phases that make no sense.
    #[error("its phases cannot be carried out: {0}")]
    Phases(String),
    /// A text that is too long.
    #[error("{0} is longer than {LONGEST_TEXT} characters")]
    TooLong(&'static str),
}

impl Plan {
    /// Reads what a model said. Subjects that are the same are one.
    pub fn read(text: &str) -> Result<Self, PlanError> {
        let plan: Self = serde_json::from_str(bare(text)).map_err(|error| PlanError::Shape(error.to_string()))?;
        plan.checked()
    }

    fn checked(self) -> Result<Self, PlanError> {
        if self.subjects.len() > MOST_SUBJECTS {
            return Err(PlanError::TooMany(self.subjects.len()));
        }
        let mut subjects: Vec<String> = Vec::new();
        for (index, subject) in self.subjects.iter().enumerate() {
            let subject = line(subject);
            if subject.is_empty() || subject.chars().count() > LONGEST_SUBJECT {
                return Err(PlanError::Subject(index + 1));
            }
            if !subjects.iter().any(|earlier| earlier.eq_ignore_ascii_case(&subject)) {
                subjects.push(subject);
            }
        }
        if subjects.is_empty() {
            return Err(PlanError::NoSubjects);
        }
        for (name, text) in [("the topic", &self.topic), ("the synthesis", &self.synthesis)] {
            if text.chars().count() > LONGEST_TEXT {
                return Err(PlanError::TooLong(name));
            }
        }
        check(&self.phases).map_err(PlanError::Phases)?;
        let phases = self.phases.into_iter().map(|phase| Phase { prompt: line(&phase.prompt), ..phase }).collect();
        Ok(Self { subjects, topic: line(&self.topic), phases, synthesis: line(&self.synthesis) })
    }
}

/// Without the fence that models like to put around JSON.
fn bare(text: &str) -> &str {
    let text = text.trim();
    let inner =
        text.strip_prefix("```json").or_else(|| text.strip_prefix("```")).and_then(|rest| rest.strip_suffix("```"));
    inner.unwrap_or(text).trim()
}

/// A text in one line, without characters that steer terminals.
fn line(text: &str) -> String {
    let text: String = text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A plan made of the words of a request, for a provider that only pretends to think: `the top 5 AI companies` are
/// `AI companies 1` to `5`. Whoever shows it says that it is simulated.
pub fn simulated(request: &str) -> Result<Plan, PlanError> {
    let words: Vec<&str> = request.split_whitespace().collect();
    let number = words.iter().enumerate().find_map(|(at, word)| {
        let count = word.parse().ok().or_else(|| spelt(word))?;
        (1..=MOST_SUBJECTS).contains(&count).then_some((at, count))
    });
    let (at, count) = number.unwrap_or((0, 3));
    let behind = words.get(if number.is_some() { at + 1 } else { 0 }..).unwrap_or_default();
    let ends = |word: &&&str| {
        !matches!(word.to_ascii_lowercase().as_str(), "and" | "by" | "in" | "for" | "with" | "to" | "of" | "then")
    };
    let what: Vec<&str> = behind.iter().take_while(ends).take(6).copied().collect();
    let what = line(&what.join(" ")).trim_matches(|letter: char| !letter.is_alphanumeric()).to_owned();
    let what = if what.is_empty() { "subject".to_owned() } else { what.chars().take(100).collect() };
    let rest: Vec<&str> = behind.iter().skip_while(ends).skip(1).copied().collect();
    Plan {
        subjects: (1..=count).map(|nth| format!("{what} {nth}")).collect(),
        topic: line(&rest.join(" ")).chars().take(LONGEST_TEXT).collect(),
        phases: usual(),
        synthesis: line(request).chars().take(LONGEST_TEXT).collect(),
    }
    .checked()
}

fn spelt(word: &str) -> Option<usize> {
    const WORDS: &[&str] = &["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
    WORDS.iter().position(|spelt| spelt.eq_ignore_ascii_case(word)).map(|at| at + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::research::{LONGEST_PROMPT, MOST_PHASES, Step};

    #[test]
    fn a_plan_is_taken_only_in_its_shape() {
        let plan = Plan::read("```json\n{\"subjects\": [\" A\\n b \", \"a b\", \"C\"], \"topic\": \"x\\u001b[2J\", \"synthesis\": \"\"}\n```").unwrap();
        assert_eq!(
            plan,
            Plan {
                subjects: vec!["A b".into(), "C".into()],
                topic: "x [2J".into(),
                phases: usual(),
                synthesis: String::new()
            }
        );
        let phased = |phases: serde_json::Value| {
            let plan = serde_json::json!({"subjects": ["a"], "topic": "", "phases": phases, "synthesis": ""});
            Plan::read(&plan.to_string()).map(|plan| plan.phases)
        };
        let phases = phased(serde_json::json!([{"kind": "search", "prompt": "prices\nof"}, {"kind": "extract"},
            {"kind": "analyze", "prompt": "Is it dear?", "barrier": true}]));
        let phase = |kind, prompt: &str, barrier| Phase { kind, prompt: prompt.to_owned(), barrier };
        assert_eq!(
            phases,
            Ok(vec![
                phase(Step::Search, "prices of", false),
                phase(Step::Extract, "", false),
                phase(Step::Analyze, "Is it dear?", true)
            ])
        );
        for (phases, expected) in [
            (serde_json::json!([]), "phases cannot"),
            (serde_json::json!([{"kind": "search"}]), "last phase"),
            (serde_json::json!([{"kind": "fetch"}, {"kind": "analyze"}]), "needs a search"),
            (serde_json::json!([{"kind": "synthesize"}]), "synthesize"),
            (serde_json::json!([{"kind": "analyze", "tools": ["shell"]}]), "tools"),
        ] {
            let error = phased(phases.clone()).unwrap_err().to_string();
            assert!(error.contains(expected), "{phases}: {error}");
        }
        let many = serde_json::json!({"subjects": vec!["a"; 51], "topic": "", "synthesis": ""}).to_string();
        let long = serde_json::json!({"subjects": ["x".repeat(201)], "topic": "", "synthesis": ""}).to_string();
        let wordy = serde_json::json!({"subjects": ["x"], "topic": "y".repeat(1001), "synthesis": ""}).to_string();
        for (text, expected) in [
            ("", "shape"),
            ("[]", "shape"),
            ("{\"subjects\": [\"a\"], \"topic\": \"x\"}", "synthesis"),
            ("{\"subjects\": \"a\", \"topic\": \"x\", \"synthesis\": \"\"}", "shape"),
            ("{\"subjects\": [\"a\"], \"topic\": \"\", \"synthesis\": \"\", \"budget\": 1000}", "budget"),
            ("{\"subjects\": [], \"topic\": \"\", \"synthesis\": \"\"}", "no subjects"),
            ("{\"subjects\": [\" \"], \"topic\": \"\", \"synthesis\": \"\"}", "subject 1"),
            (&many, "51 subjects"),
            (&long, "longer than 200"),
            (&wordy, "the topic"),
        ] {
            let error = Plan::read(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn the_schema_says_what_is_checked() {
        let schema: serde_json::Value = serde_json::from_str(SCHEMA).unwrap();
        let subjects = &schema["properties"]["subjects"];
        assert_eq!(subjects["maxItems"], MOST_SUBJECTS);
        assert_eq!(subjects["items"]["maxLength"], LONGEST_SUBJECT);
        let phases = &schema["properties"]["phases"];
        assert_eq!(phases["maxItems"], MOST_PHASES);
        assert_eq!(phases["items"]["properties"]["prompt"]["maxLength"], LONGEST_PROMPT);
        for text in ["topic", "synthesis"] {
            assert_eq!(schema["properties"][text]["maxLength"], LONGEST_TEXT);
        }
        let plan = serde_json::to_value(simulated("x").unwrap()).unwrap();
        let keys: Vec<&String> = plan.as_object().unwrap().keys().collect();
        let known: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
        assert_eq!(keys, known);
    }

    #[test]
    fn the_request_of_the_founding_document_is_planned_without_a_model() {
        let plan = simulated("Research the top 5 AI companies and compare their products").unwrap();
        assert_eq!(
            plan.subjects,
            ["AI companies 1", "AI companies 2", "AI companies 3", "AI companies 4", "AI companies 5"]
        );
        assert_eq!(plan.topic, "compare their products");
        assert_eq!(simulated("three breeds of sheep").unwrap().subjects, ["breeds 1", "breeds 2", "breeds 3"]);
        assert_eq!(simulated("sheep").unwrap().subjects.len(), 3);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_that_a_model_says_breaks_the_reader(text in "\\PC{0,60}", subjects in proptest::collection::vec("\\PC{0,30}|\\s{0,3}", 0..60)) {
            let _ = Plan::read(&text);
            let said = serde_json::json!({"subjects": subjects, "topic": text, "synthesis": text}).to_string();
            if let Ok(plan) = Plan::read(&said) {
                prop_assert!(!plan.subjects.is_empty() && plan.subjects.len() <= MOST_SUBJECTS);
                prop_assert!(plan.subjects.iter().all(|subject| !subject.is_empty() && !subject.contains(char::is_control)));
                prop_assert_eq!(Plan::read(&serde_json::to_string(&plan).unwrap()), Ok(plan));
            }
            let plan = simulated(&text).unwrap();
            prop_assert!(!plan.subjects.is_empty() && plan.subjects.len() <= MOST_SUBJECTS);
        }
    }
}
