//! Swarms on a real Slurm, as people use them: from the login host itself, and from a laptop that has SSH to it.

use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;

use drover_e2e::slurm::{Seat, Site, codex, prepared, with};
use drover_proto::common::LaunchSpec;
use drover_proto::router::launch_swarm_response::Step;
use drover_proto::router::{InjectRequest, LaunchSwarmRequest};
use drover_testkit::codex::{codex_bin, repository_root};
use drover_testkit::lab::{Options, USER, usable};
use drover_testkit::{skip, this_test};
use serde_json::{Value, json};

/// Does the work in a laboratory, or notes why there is none.
fn lab(options: Options, seat: Seat, more: &str, work: impl AsyncFnOnce(&mut Site) -> anyhow::Result<()> + Send) {
    match usable(&options) {
        Ok(()) => with(options, seat, more, work).unwrap_or_else(|error| panic!("{error:#}")),
        Err(why) => skip(&this_test(), &why),
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// Workers on all compute hosts.
fn workers(site: &Site) -> anyhow::Result<usize> {
    let hosts = site.lab.nodes();
    // Beside each is the parent that srun started.
    let on = |host: &String| {
        anyhow::Ok(site.named(host, "daemon worker")?.len() - site.named(host, "daemon worker --slurm")?.len())
    };
    hosts.iter().map(on).sum()
}

#[test]
fn a_swarm_from_the_login_host() {
    lab(Options::default(), Seat::Login, "worker: {agent: echo, drain_grace: 2s}", async |site| {
        let prompt = "You are a focused autonomous agent.";
        let place = ["--partition", "mi2508x", "--time", "00:10:00"];
        let launched = site.ok(&[&["launch", "--nodes", "4", "--prompt", prompt][..], &place].concat())?;
        let answers = launched.stdout.lines().filter(|line| line.starts_with("node ") && line.ends_with(prompt));
        assert_eq!(answers.count(), 4, "{}{}", launched.stdout, launched.stderr);

        let status = site.status("last")?;
        let swarm = text(&status, "swarm_id").to_owned();
        assert_eq!((text(&status, "slurm_state"), text(&status, "status")), ("RUNNING", "running"), "{status:#}");
        let hosts: BTreeSet<&str> = status["nodes"].as_array().unwrap().iter().map(|node| text(node, "host")).collect();
        assert_eq!(hosts, ["n1", "n2", "n3", "n4"].into(), "each node is a host of its own");
        assert_eq!(site.queue()?, [(text(&status, "job_id").to_owned(), "RUNNING".to_owned())]);
        site.wait("four workers and one follower are seen", || {
            Ok((workers(site)? == 4 && site.followers()?.len() == 1).then_some(()))
        })?;

        let said = site.ok(&["inject", &swarm, "--prompt", "Optimize GEMM tiling."])?;
        assert_eq!(said.stdout.matches("Optimize GEMM tiling.").count(), 4, "{}", said.stdout);
        let listed = site.json(&["list", "--json"])?;
        assert_eq!(text(&listed[0], "slurm_state"), "RUNNING", "{listed:#}");

        // Nobody but Slurm's own user may look at what is ours.
        let mode = site.lab.run("login", &["stat", "-c", "%a %U", "codeswarm/mailbox"])?;
        assert_eq!(mode, "700 labuser");

        site.ok(&["terminate", &swarm])?;
        site.wait_status(&swarm, "the end is confirmed", |status| {
            matches!(text(status, "slurm_state"), "CANCELLED" | "COMPLETED") && text(status, "status") == "terminated"
        })?;
        site.wait("no worker and no job", || Ok((workers(site)? == 0 && site.queue()?.is_empty()).then_some(())))?;
        let events = site.ok(&["events", "--since", "0", "--swarm", &swarm, "--json"])?;
        let named = |name: &str| events.stdout.matches(&format!("\"event\":\"{name}\"")).count();
        assert_eq!((named("worker_bye"), named("turn_complete")), (4, 8), "{}", events.stdout);
        Ok(())
    });
}

#[test]
fn three_commands_on_a_laptop_and_codex_answers_on_four_hosts() {
    let Some(program) = codex_bin() else { return };
    if let Err(why) = usable(&Options::default()) {
        return skip(&this_test(), &why);
    }
    let done = prepared(Options::default(), Seat::Laptop, "", async |site| {
        let mock = codex::install(site, &program)?;
        // The mission's own file; only the places are those of the laboratory.
        let mut config: Value =
            serde_json::from_str(&fs::read_to_string(repository_root().join("configs/hpcfund.json"))?)?;
        config["ssh"]["login_alias"] = json!("login");
        config["cluster"]["workspace_root"] = json!(format!("/home/{USER}"));
        config["cluster"]["slurm"] = json!({"program": site.dir().join("drover"), "poll": "2s"});
        config["worker"] = json!({"codex_bin": codex::program(), "codex_home": codex::settings()});
        let file = site.dir().join("hpcfund.json");
        fs::write(&file, config.to_string())?;
        let file = ["--config", file.to_str().unwrap()];

        let prompt = "You are a focused autonomous agent. @mock say='ready to work' deltas=3";
        let place = ["--nodes", "4", "--partition", "mi2508x", "--time", "00:10:00"];
        let launched = site.ok(&[&["launch"][..], &place, &["--prompt", prompt], &file].concat())?;
        let answers = launched.stdout.lines().filter(|line| line.ends_with("| ready to work"));
        assert_eq!(answers.count(), 4, "{}{}", launched.stdout, launched.stderr);
        let listed = site.json(&[&["list", "--json"][..], &file].concat())?;
        let swarm = text(&listed[0], "swarm_id").to_owned();
        let mut attached = site.command(&[&["attach", &swarm][..], &file].concat());
        let attached = attached.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;

        let prompt = "Optimize GEMM tiling. @mock say='tiles of 128' deltas=2";
        let said = site.ok(&[&["inject", &swarm, "--prompt", prompt][..], &file].concat())?;
        let answers = said.stdout.lines().filter(|line| line.ends_with("| tiles of 128"));
        assert_eq!(answers.count(), 4, "{}{}", said.stdout, said.stderr);
        let status = site.json(&[&["status", &swarm, "--json"][..], &file].concat())?;
        assert_eq!((text(&status, "slurm_state"), text(&status, "status")), ("RUNNING", "running"), "{status:#}");
        // Sessions live on hosts that a laptop has no way to but the files behind the login host.
        let on = |args: &[&str]| site.json(&[args, &["--json"], &file].concat());
        site.wait("the hosts have found each other", || {
            let members = on(&["members", &swarm])?;
            let alive = members.as_array().unwrap().iter().filter(|member| member["state"] == "alive");
            Ok((alive.count() == 4).then_some(()))
        })?;
        let words = "Remember heliotrope.";
        let said = site.ok(&[&["send", "notes", "--agent", "echo", "--prompt", words][..], &file].concat())?;
        assert_eq!(said.stdout.trim_end(), words);
        let moved = on(&["handoff", "notes"])?;
        let listed = on(&["sessions"])?;
        assert_eq!(
            (text(&listed[0], "session_id"), text(&listed[0], "owner")),
            ("notes", text(&moved, "to")),
            "{listed}"
        );
        let recalled = site.ok(&[&["send", "notes", "--prompt", "@echo recall"][..], &file].concat())?;
        assert!(recalled.stdout.contains("heliotrope"), "{}", recalled.stdout);
        assert_eq!(site.lab.ssh_connections()?, 1, "one connection carries everything");
        assert_eq!(site.followers()?.len(), 1);
        // A laptop reaches nothing but SSH, and nothing of ours listens beyond loopback.
        let listening = site.lab.run("login", &["ss", "-Hltn"])?;
        let open = |line: &&str| {
            !line.contains("127.0.0.1:") && !line.contains(":22 ") && !line.contains(&mock.addr().to_string())
        };
        assert_eq!(listening.lines().filter(open).collect::<Vec<_>>(), Vec::<&str>::new());

        site.ok(&[&["terminate", &swarm][..], &file].concat())?;
        let followed = attached.wait_with_output()?;
        let followed = String::from_utf8_lossy(&followed.stdout).into_owned();
        assert!(followed.contains("tiles of 128"), "attach saw the answers: {followed}");
        site.wait("no worker and no job", || Ok((workers(site)? == 0 && site.queue()?.is_empty()).then_some(())))?;
        site.ok(&[&["down"][..], &file].concat())?;
        assert_eq!(mock.violations(), Vec::<String>::new());
        Ok(())
    });
    done.unwrap_or_else(|error: anyhow::Error| panic!("{error:#}"));
}

/// What a shell, Slurm or we ourselves could take for something else than a value.
fn hostile() -> Vec<String> {
    let mut values: Vec<String> = [
        "a'b",
        "a\"b",
        "a\nb",
        "a\0b",
        "$(touch /home/labuser/pwned)",
        "`touch /home/labuser/pwned`",
        "'; touch /home/labuser/pwned; '",
        "\n#SBATCH --wrap=touch /home/labuser/pwned",
        "-rf",
        "--wrap=touch /home/labuser/pwned",
        "--uid=0",
        "a b",
        "%j",
        "../../x",
        "\u{1b}[31m",
    ]
    .map(str::to_owned)
    .into();
    values.push("x".repeat(1 << 20));
    values
}

/// Sets one field of a launch.
type Set = fn(&mut LaunchSpec, String);

/// What a launch came to: the swarm, or why there is none.
async fn launch(site: &Site, spec: LaunchSpec) -> anyhow::Result<Result<String, String>> {
    let request = LaunchSwarmRequest { spec: Some(spec), ..Default::default() };
    let mut steps = match site.router().launch_swarm(request).await {
        Ok(steps) => steps.into_inner(),
        Err(status) => return Ok(Err(status.message().to_owned())),
    };
    loop {
        match steps.message().await {
            Ok(Some(step)) => {
                if let Some(Step::Launched(swarm)) = step.step {
                    return Ok(Ok(swarm.swarm_id));
                }
            }
            Ok(None) => anyhow::bail!("a launch without an end"),
            Err(status) => return Ok(Err(status.message().to_owned())),
        }
    }
}

#[test]
fn hostile_values_are_refused_or_stay_what_they_are() {
    let options = Options { nodes: 1, ..Options::default() };
    lab(options, Seat::Login, "worker: {agent: echo, drain_grace: 1s}", async |site| {
        let good = || LaunchSpec {
            node_count: 1,
            partition: "mi2508x".to_owned(),
            time: "00:10:00".to_owned(),
            ..Default::default()
        };
        let fields: [(&str, Set); 7] = [
            ("partition", |spec, value| spec.partition = value),
            ("time", |spec, value| spec.time = value),
            ("account", |spec, value| spec.account = value),
            ("qos", |spec, value| spec.qos = value),
            ("agent", |spec, value| spec.agent = value),
            ("provider", |spec, value| spec.provider = value),
            ("constraint", |spec, value| _ = spec.params.insert("constraint".to_owned(), value)),
        ];
        // A job of somebody who would like to be taken for us, or to be run by whoever reads the queue.
        let evil = "drover-$(touch /home/labuser/pwned).1|RUNNING|n1|'\"";
        site.lab.run("login", &["sbatch", "--hold", "--job-name", evil, "--comment", evil, "--wrap", "true"])?;
        for (field, set) in fields {
            for value in hostile() {
                let mut spec = good();
                set(&mut spec, value.clone());
                let shown: String = value.chars().take(60).collect();
                match launch(site, spec).await? {
                    Err(refused) => {
                        let length = refused.len();
                        assert!((1..4096).contains(&length), "{field} {shown:?}: {length} bytes");
                    }
                    // A Slurm without accounts takes any word for one.
                    Ok(swarm) => {
                        let harmless = |c: char| c.is_ascii_alphanumeric() || "._/%".contains(c);
                        assert!(value.chars().all(harmless), "{field} {shown:?} was launched");
                        site.ok(&["terminate", "--force", &swarm])?;
                    }
                }
            }
        }
        site.wait("what was launched is over", || Ok((site.queue()?.len() == 1).then_some(())))?;
        assert_eq!(site.queue()?.len(), 1, "nothing was submitted");

        // A prompt may be anything, and comes to the agent as it is.
        let swarm = launch(site, good()).await?.unwrap();
        let all = hostile();
        for value in &all {
            let request = InjectRequest { swarm_id: swarm.clone(), content: value.clone(), ..Default::default() };
            let mut steps = site.router().inject(request).await?.into_inner();
            while steps.message().await?.is_some() {}
        }
        let answers = site.wait("every answer", || {
            let events = site.ok(&["events", "--since", "0", "--swarm", &swarm, "--json"])?;
            let lines = events.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let answers = lines.filter(|event| event["event"] == "assistant");
            let answers: Vec<String> = answers.map(|event| text(&event["data"], "content").to_owned()).collect();
            Ok((answers.len() == all.len()).then_some(answers))
        })?;
        for (value, answer) in all.iter().zip(&answers) {
            let shown: String = value.chars().take(60).collect();
            assert_eq!(answer.len(), value.trim().len(), "{shown:?}");
            assert_eq!(answer, value.trim(), "{shown:?}");
        }
        site.ok(&["terminate", &swarm])?;
        let found = site.lab.run("login", &["ls", "-A", "."])?;
        assert!(!found.contains("pwned"), "something was run: {found}");
        Ok(())
    });
}
