//! Other programs for the same job, in the same run: the proxy of `LiteLLM` and the embedded gateway of `TensorZero`, both from
//! PyPI, both asking the same mock.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_testkit::cluster::scratch_dir;
use drover_testkit::mock_llm::Settings;
use serde_json::Value;

use super::super::figures::{Figure, Goal};
use super::driver::{self, flood};
use super::rig::{Mock, OURS, THEIRS, cpu, http};
use super::{Plan, figure, speed};

/// Asks through the embedded gateway, many at a time; prints how long it took and what processor time it cost.
const EMBEDDED: &str = r#"
import asyncio, json, os, resource, sys, time
from tensorzero import AsyncTensorZeroGateway

async def main(config, calls, width):
    gateway = await AsyncTensorZeroGateway.build_embedded(config_file=config, async_setup=True)
    async def ask(number):
        answer = await gateway.inference(
            model_name="m", input={"messages": [{"role": "user", "content": f"prompt number {number}"}]})
        assert answer.content[0].text, answer
    async def asker(numbers):
        for number in numbers:
            await ask(number)
    await asyncio.gather(*(asker(range(n, width, width)) for n in range(width)))
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    await asyncio.gather(*(asker(range(n, calls, width)) for n in range(width)))
    took, now = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    print(json.dumps({"calls": calls, "seconds": took, "cpu": cpu}))

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"#;

/// How long a rival may take to start.
const STARTING: Duration = Duration::from_mins(2);

/// All of them, or none where pip cannot install them.
pub(super) fn run(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let python = match installed() {
        Ok(python) => python,
        Err(why) => {
            super::progress(&format!("left out, LiteLLM and TensorZero: {why:#}"));
            return Ok(Vec::new());
        }
    };
    let (ours, ours_cpu) = speed::flooded(plan.flood)?;
    let lite = litellm(&python, plan)?;
    let tensor = tensorzero(&python, plan)?;
    let same = "no latency, 64 at once, one core";
    Ok(vec![
        beside(format!("calls a second, front beside the LiteLLM proxy, {same}"), ours, lite.rate, "/s"),
        figure("of it: how many times its calls a second", ours / lite.rate, "", Goal::AtLeast(100.0)),
        beside("processor time of a call, front beside the LiteLLM proxy".to_owned(), ours_cpu, lite.cpu_us, "us"),
        beside(format!("calls a second, front beside TensorZero embedded in Python, {same}"), ours, tensor.rate, "/s"),
        figure("of it: how many times its calls a second", ours / tensor.rate, "", Goal::AtLeast(3.0)),
        beside("processor time of a call, front beside TensorZero embedded".to_owned(), ours_cpu, tensor.cpu_us, "us"),
        figure("of it: share of its processor time", ours_cpu / tensor.cpu_us, "", Goal::Below(1.0 / 3.0)),
    ])
}

fn beside(name: String, ours: f64, theirs: f64, unit: &'static str) -> Figure {
    Figure { name, ours, ideal: Some(theirs), unit, goal: Goal::Shown }
}

struct Rival {
    rate: f64,
    cpu_us: f64,
}

/// The interpreter of an environment that has both; made when it is missing.
fn installed() -> anyhow::Result<PathBuf> {
    let target = std::env::current_exe()?;
    let target = target.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file()).context("no target directory")?;
    let dir = target.join("rivals");
    let python = dir.join("bin/python");
    let there = |python: &Path| {
        let mut import = Command::new(python);
        import.args(["-c", "import litellm, litellm.proxy.proxy_server, tensorzero"]);
        import.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    if !there(&python) {
        super::progress("installing LiteLLM and TensorZero with pip, in an environment of their own");
        let made = Command::new("python3").args(["-m", "venv"]).arg(&dir).output()?;
        ensure!(made.status.success(), "no environment: {}", String::from_utf8_lossy(&made.stderr));
        let pip =
            Command::new(&python).args(["-m", "pip", "install", "-q", "litellm[proxy]", "tensorzero"]).output()?;
        ensure!(pip.status.success(), "pip: {}", String::from_utf8_lossy(&pip.stderr));
        ensure!(there(&python), "what pip installed cannot be imported");
    }
    Ok(python)
}

fn quick() -> Settings {
    Settings { answer: Some("noon".to_owned()), ..Settings::default() }
}

/// A child that is ended with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn litellm(python: &Path, plan: &Plan) -> anyhow::Result<Rival> {
    let mock = Mock::start(&quick(), Some(THEIRS))?;
    let dir = scratch_dir("litellm-")?;
    let config = dir.path().join("config.yaml");
    let base = format!("http://{}/v1", mock.addr());
    fs::write(
        &config,
        format!(
            "model_list:\n  - model_name: auto\n    litellm_params: {{model: openai/m, api_base: \"{base}\", api_key: none}}\n\
             general_settings: {{}}\nlitellm_settings: {{telemetry: false}}\n"
        ),
    )?;
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let addr = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let log = fs::File::create(dir.path().join("log"))?;
    let child = Command::new("taskset")
        .args(["-c", OURS])
        .arg(python.with_file_name("litellm"))
        .args(["--host", "127.0.0.1", "--num_workers", "1", "--port", &port.to_string(), "--config"])
        .arg(&config)
        .env("LITELLM_LOG", "ERROR")
        .env("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        // Without a key it has less to do.
        .env("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY", "true")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    let running = Running(child);
    let deadline = Instant::now() + STARTING;
    while !http(addr, "GET", "/health/liveliness", "", "").is_ok_and(|(status, _)| status == 200) {
        let said = || fs::read_to_string(dir.path().join("log")).unwrap_or_default();
        ensure!(Instant::now() < deadline, "LiteLLM did not start: {}", said());
        std::thread::sleep(Duration::from_millis(200));
    }
    let before = (cpu(running.0.id())?, mock.ledger()?.answered);
    let (callers, time) = (vec![String::new(); 64], plan.flood);
    let flood =
        driver::on_core(
            Some(THEIRS),
            async move { flood(addr, "/v1/chat/completions", "auto", &callers, time).await },
        )?;
    let after = (cpu(running.0.id())?, mock.ledger()?.answered);
    let rival = Rival { rate: flood.rate(), cpu_us: (after.0 - before.0) * 1e6 / (after.1 - before.1).max(1) as f64 };
    super::progress(&format!("LiteLLM: {:.0} calls/s, {:.0} us of processor a call", rival.rate, rival.cpu_us));
    Ok(rival)
}

fn tensorzero(python: &Path, plan: &Plan) -> anyhow::Result<Rival> {
    let mock = Mock::start(&quick(), Some(THEIRS))?;
    let dir = scratch_dir("tensorzero-")?;
    let config = dir.path().join("tensorzero.toml");
    let base = format!("http://{}/v1/", mock.addr());
    fs::write(
        &config,
        format!(
            "[gateway]\nobservability.enabled = false\n[models.m]\nrouting = [\"mock\"]\n[models.m.providers.mock]\n\
             type = \"openai\"\nmodel_name = \"m\"\napi_base = \"{base}\"\napi_key_location = \"none\"\n"
        ),
    )?;
    let ran = Command::new("taskset")
        .args(["-c", OURS])
        .arg(python)
        .args(["-c", EMBEDDED])
        .arg(&config)
        .args([&plan.rivalled.to_string(), "64"])
        .output()?;
    ensure!(ran.status.success(), "TensorZero: {}", String::from_utf8_lossy(&ran.stderr));
    let said = String::from_utf8_lossy(&ran.stdout);
    let line = said.lines().find(|line| line.starts_with("{\"calls\"")).unwrap_or_default().to_owned();
    let seen: Value = serde_json::from_str(&line).with_context(|| format!("TensorZero said {line:?}"))?;
    let number = |key: &str| seen[key].as_f64().with_context(|| format!("no {key} in {line}"));
    let (calls, seconds, cpu) = (number("calls")?, number("seconds")?, number("cpu")?);
    let rival = Rival { rate: calls / seconds, cpu_us: cpu * 1e6 / calls };
    super::progress(&format!("TensorZero: {:.0} calls/s, {:.0} us of processor a call", rival.rate, rival.cpu_us));
    Ok(rival)
}
