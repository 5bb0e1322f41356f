//! The way from the router to a follower on a login host.

use std::fs;
use std::time::Duration;

use drover_proto::failure_of;
use drover_slurm_allocator::cluster::{Stage, Way};
use drover_types::ErrorCode;

use crate::site::Site;
use crate::support::{executable, set, wait};

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_carries_everything_and_the_program_is_sent_once() {
    let Some(site) = Site::start("") else { return };
    let cluster = site.cluster();
    let mut client = site.client(&cluster);
    assert_eq!(site.sshd.logins(), 0, "nothing is connected to before somebody wants something");
    let _follower = site.follower("f1");
    client.deliver_in_time("{\"n\":1}").await;
    for other in 0..3 {
        site.client(&cluster).deliver_in_time(&format!("{{\"other\":{other}}}")).await;
    }
    let ready = cluster.ready().await.unwrap();
    assert!(ready.program.sent && ready.program.path.starts_with(&format!("{}/bin/", site.settings.base)), "{ready:?}");
    assert_eq!(*cluster.stage().borrow(), Stage::Ready(ready.clone()));
    assert_eq!(site.sshd.logins(), 1);
    assert!((1..4).contains(&site.count("asked")), "the follower is not looked for with each connection");
    assert_eq!(fs::read(&ready.program.path).unwrap(), fs::read(&site.settings.program).unwrap());
    assert_eq!(fs::read_to_string(site.dir.join("settings")).unwrap(), "{}");
    let inbox = fs::read_to_string(format!("{}/swarm-1/00/inbox/00000001.jsonl", site.settings.mailbox())).unwrap();
    assert!(inbox.starts_with("{\"n\":1}\n"), "{inbox}");

    // A later allocator finds the program there.
    let later = site.cluster().ready().await.unwrap();
    assert_eq!((later.program.sent, &later.program.path), (false, &ready.program.path));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_is_gone_is_started_again_and_found() {
    let Some(site) = Site::start("") else { return };
    let cluster = site.cluster();
    let mut client = site.client(&cluster);
    let first = site.follower("f1");
    client.deliver_in_time("{\"n\":1}").await;
    first.shutdown().cancel();
    let _second = site.follower("f2");
    client.deliver_in_time("{\"n\":2}").await;
    assert!(site.count("asked") >= 2);
    assert_eq!(site.sshd.logins(), 1, "the connection is the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_is_told_with_its_reason_and_comes_back() {
    let Some(mut site) = Site::start("") else { return };
    let cluster = site.cluster();
    let mut client = site.client(&cluster);
    let follower = site.follower("f1");
    client.deliver_in_time("{\"n\":1}").await;
    site.sshd.kill();
    // The first call may still break with the old connection; from then on there is a reason.
    let deadline = std::time::Instant::now() + Duration::from_mins(1);
    loop {
        let failure = failure_of(&client.deliver("{\"n\":2}").await.unwrap_err());
        if failure.message.contains("no connection") {
            assert!(failure.hint.contains("drover doctor --cluster hpc"), "{failure:?}");
            assert_eq!(failure.code, ErrorCode::BackendUnavailable);
            break;
        }
        assert!(std::time::Instant::now() < deadline, "no reason is told: {failure:?}");
    }
    site.sshd.listen();
    client.deliver_in_time("{\"n\":3}").await;
    assert!(!follower.shutdown().is_cancelled(), "the follower has nothing to do with the connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_forwarding_is_forbidden_our_program_is_the_bridge() {
    let Some(site) = Site::start("AllowTcpForwarding no") else { return };
    let cluster = site.cluster();
    let mut client = site.client(&cluster);
    let first = site.follower("f1");
    client.deliver_in_time("{\"n\":1}").await;
    assert!(site.count("connected") >= 1);
    // A bridge that finds nobody says so only by its end.
    first.shutdown().cancel();
    let _second = site.follower("f2");
    client.deliver_in_time("{\"n\":2}").await;
    assert_eq!(site.sshd.logins(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_systems_ssh_leads_there_as_well() {
    let Some(mut site) = Site::start("") else { return };
    let settings = site.sshd.settings("drover-sh");
    site.settings.way = Way::System(Box::new(settings));
    let cluster = site.cluster();
    let _follower = site.follower("f1");
    site.client(&cluster).deliver_in_time("{\"n\":1}").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn this_host_as_the_login_host_needs_no_ssh() {
    let Some(mut site) = Site::start("") else { return };
    site.settings.way = Way::Here;
    let cluster = site.cluster();
    let mut client = site.client(&cluster);
    let first = site.follower("f1");
    client.deliver_in_time("{\"n\":1}").await;
    first.shutdown().cancel();
    let _second = site.follower("f2");
    client.deliver_in_time("{\"n\":2}").await;
    assert_eq!(site.sshd.logins(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_work_is_told_at_once_with_what_to_do() {
    let Some(mut site) = Site::start("") else { return };
    let ready = async |site: &Site| site.cluster().ready().await.unwrap_err();

    executable(&site.settings.program, "#!/nowhere/interpreter\n");
    let failure = ready(&site).await;
    assert!(failure.hint.contains("static build"), "{failure:?}");
    assert_eq!(failure.code, ErrorCode::ProviderUnavailable, "no launch waits for what never comes");

    // Our program complains in JSON, and its words are passed on.
    let complaint = r#"{"error":{"code":null,"message":"state directory is full","hint":"free some space"}}"#;
    executable(&site.settings.program, &format!("#!/bin/sh\necho '{complaint}' >&2\nexit 1\n"));
    let failure = ready(&site).await;
    assert_eq!(
        (failure.message.as_str(), failure.hint.as_str()),
        ("on hpc: state directory is full", "free some space")
    );

    executable(&site.settings.program, "#!/bin/sh\necho Welcome to hpc\n");
    let failure = ready(&site).await;
    assert!(failure.message.contains("Welcome to hpc"), "{failure:?}");

    site.settings.program = site.dir.join("missing");
    assert!(ready(&site).await.message.contains("missing"));

    let mut settings = site.sshd.settings("drover-sh");
    set(&mut settings, "UserKnownHostsFile", "none");
    site.settings.way = Way::Builtin(Box::new(settings));
    site.settings.program = "/bin/true".into();
    let failure = ready(&site).await;
    assert!(failure.message.contains("no connection to cluster"), "{failure:?}");
    assert_eq!(failure.code, ErrorCode::ProviderUnavailable);
    let mut client = site.client(&site.cluster());
    // A machine that is busy with other things may be told first that it takes a while.
    let deadline = std::time::Instant::now() + Duration::from_mins(1);
    loop {
        let told = failure_of(&client.deliver("{}").await.unwrap_err());
        if (&told.message, &told.hint) == (&failure.message, &failure.hint) {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "the router is not told the same: {told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_failed_is_tried_again_by_the_next_who_asks() {
    let Some(site) = Site::start("") else { return };
    let cluster = site.cluster();
    let failure = cluster.ready().await.unwrap_err();
    assert!(matches!(&*cluster.stage().borrow(), Stage::Failed(known) if *known == failure));
    let _follower = site.follower("f1");
    cluster.ready().await.unwrap();
    wait("the address book to have no entry", || {
        drover_service::address_book::read(site.ctx.state(), "outbox-follower@hpc").is_none()
    });
}
