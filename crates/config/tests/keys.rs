//! Every documented key acts: for each there is a test somewhere in the repository that fails when it does not.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The resolved catalogue is what the rest of the program sees of these; the snapshot shows each of them in it.
const CATALOGUE: &str = "existing_files_load_unchanged_and_mean_one_thing";

/// Key, and the test that shows what it does.
const SHOWN_BY: &[(&str, &str)] = &[
    ("router.listen", "every_daemon_listens_where_it_is_told"),
    ("router.control_listen", "every_daemon_listens_where_it_is_told"),
    ("router.max_line_bytes", "long_lines_and_slow_readers_are_cut_off_as_configured"),
    ("router.subscriber_max_bytes", "long_lines_and_slow_readers_are_cut_off_as_configured"),
    ("router.keep_events_for", "old_events_make_room_as_configured"),
    ("router.keep_events", "old_events_make_room_as_configured"),
    ("router.keep_ended_swarms_for", "a_swarm_that_ended_long_ago_is_forgotten_with_its_mailbox"),
    ("router.launch_soft_timeout", "a_launch_goes_on_without_the_nodes_that_stay_away_and_gets_them_back"),
    ("router.launch_hard_timeout", "a_launch_of_which_nothing_comes_up_fails_after_the_configured_time"),
    ("router.graceful_terminate_timeout", "a_termination_waits_as_long_as_configured"),
    ("allocator.listen", "every_daemon_listens_where_it_is_told"),
    ("allocator.max_local_nodes", "what_cannot_be_launched_says_why_and_what_to_do"),
    ("follower.listen", "every_daemon_listens_where_it_is_told"),
    ("follower.hot_poll", "without_word_from_the_system_only_hot_nodes_are_polled"),
    ("follower.cold_poll", "without_word_from_the_system_only_hot_nodes_are_polled"),
    ("follower.segment_bytes", "agent_and_segments_are_as_configured"),
    ("follower.end_when_idle", "a_follower_that_nobody_uses_ends_by_itself"),
    ("worker.listen", "every_daemon_listens_where_it_is_told"),
    ("worker.agent", "agent_and_segments_are_as_configured"),
    ("worker.codex_bin", "the_native_binary_is_found_behind_the_shim"),
    ("worker.codex_args", "codex_is_started_as_configured"),
    ("worker.agent_env", "codex_is_started_as_configured"),
    ("worker.codex_home", "credentials_are_linked_and_settings_copied_in_private"),
    ("worker.codex_provider", "codex_asks_the_pool_over_tls_and_through_the_mailbox"),
    ("worker.codex_model", "who_asks_the_pool_has_a_token_in_its_environment_and_no_credentials"),
    ("worker.pool_carriage", "codex_asks_the_pool_over_tls_and_through_the_mailbox"),
    ("worker.pool_address", "codex_asks_the_pool_over_tls_and_through_the_mailbox"),
    ("worker.own_session", "what_is_injected_into_a_node_is_said_in_its_own_session_which_moves"),
    ("worker.run_tasks", "pages_are_read_on_nodes_and_none_is_lost_or_read_twice_when_nodes_die"),
    ("worker.approval_policy", "a_command_runs_only_when_it_is_approved"),
    ("worker.sandbox_mode", "a_patch_is_applied_only_when_it_is_approved"),
    ("worker.auto_approve", "policy_approves_only_what_stays_inside"),
    ("worker.approval_timeout", "orders_from_the_inbox_are_carried_out"),
    ("worker.max_agent_restarts", "codex_is_started_as_configured"),
    ("worker.max_restarts", "a_worker_that_always_fails_is_given_up_with_the_end_of_its_log"),
    ("worker.restart_delay", "a_killed_worker_comes_back_as_the_next_generation_and_what_it_left_is_gone"),
    ("worker.healthy_after", "a_worker_that_ran_long_enough_has_its_restarts_forgiven"),
    ("worker.drain_grace", "sigterm_gives_the_turn_its_grace_then_interrupts_it_and_leaves_the_queue"),
    ("worker.segment_bytes", "many_deltas_pass_whole_and_in_order_over_many_segments"),
    ("worker.max_queue", "a_full_queue_refuses_with_a_reason_and_takes_no_place"),
    ("cluster.backend", CATALOGUE),
    ("cluster.workspace_root", "the_mailbox_is_the_flag_then_the_cluster_then_the_state_directory"),
    ("cluster.cluster_subdir", "the_mailbox_is_the_flag_then_the_cluster_then_the_state_directory"),
    ("cluster.hosts", "hosts_are_assigned_taken_released_and_free_again"),
    ("cluster.local.workspace_root", CATALOGUE),
    ("cluster.local.default_sandbox_mode", "a_launch_overrides_the_provider_and_wrong_words_are_refused"),
    ("cluster.slurm.login_host", CATALOGUE),
    ("cluster.slurm.ssh", "a_cluster_is_reached_and_furnished_as_configured"),
    ("cluster.slurm.program", "a_cluster_is_reached_and_furnished_as_configured"),
    ("cluster.slurm.poll", "the_knobs_of_a_cluster_are_those_of_its_profile_then_of_the_section"),
    ("cluster.slurm.calls_per_minute", "the_knobs_of_a_cluster_are_those_of_its_profile_then_of_the_section"),
    ("cluster.slurm.local_dir", "the_knobs_of_a_cluster_are_those_of_its_profile_then_of_the_section"),
    ("cluster.slurm.workspace_root", CATALOGUE),
    ("cluster.slurm.cluster_subdir", CATALOGUE),
    ("cluster.slurm.partition", CATALOGUE),
    ("cluster.slurm.time_limit", CATALOGUE),
    ("cluster.slurm.account", CATALOGUE),
    ("cluster.slurm.qos", CATALOGUE),
    ("cluster.slurm.approval_policy", CATALOGUE),
    ("cluster.slurm.profiles", CATALOGUE),
    ("ssh.login_alias", CATALOGUE),
    ("slurm.default_partition", CATALOGUE),
    ("slurm.default_time", CATALOGUE),
    ("slurm.default_account", CATALOGUE),
    ("slurm.default_qos", CATALOGUE),
    ("launch_providers[].id", CATALOGUE),
    ("launch_providers[].label", CATALOGUE),
    ("launch_providers[].backend", CATALOGUE),
    ("launch_providers[].cluster_profile", CATALOGUE),
    ("launch_providers[].defaults", "the_agent_is_the_one_named_closest_to_the_launch"),
    ("launch_providers[].launch_fields", CATALOGUE),
    ("security.allow_uids", "another_user_is_refused_unless_allowed"),
    ("security.metrics_uids", "an_observer_sees_how_a_daemon_fares_and_nothing_else"),
    ("security.token_file", "a_token_is_wanted_at_both_doors_when_there_is_one"),
    ("security.roles.read", "each_role_opens_what_it_names_and_nothing_else"),
    ("security.roles.inject", "each_role_opens_what_it_names_and_nothing_else"),
    ("security.roles.launch", "each_role_opens_what_it_names_and_nothing_else"),
    ("security.roles.terminate", "each_role_opens_what_it_names_and_nothing_else"),
    ("security.roles.approve", "each_role_opens_what_it_names_and_nothing_else"),
    ("security.roles.dispatch", "each_role_opens_what_it_names_and_nothing_else"),
    ("security.audit_file_size", "a_full_file_makes_room_and_no_line_is_lost_or_torn"),
    ("security.gossip_plaintext", "in_the_clear_only_when_asked_for_and_said_at_every_start"),
    ("swarm.enabled", "a_node_that_takes_no_part_binds_nothing_and_says_so"),
    ("swarm.listen", "a_node_is_named_bound_and_told_of_as_configured"),
    ("swarm.node_id", "a_node_is_named_bound_and_told_of_as_configured"),
    ("swarm.bind_addr", "a_node_is_named_bound_and_told_of_as_configured"),
    ("swarm.bind_port", "a_node_is_named_bound_and_told_of_as_configured"),
    ("swarm.advertise_addr", "a_node_is_named_bound_and_told_of_as_configured"),
    ("swarm.region", "a_node_is_named_bound_and_told_of_as_configured"),
    ("swarm.discovery.join_addrs", "three_nodes_find_each_other_through_one_seed"),
    ("swarm.discovery.gossip_interval", "the_paces_of_the_gossip_are_those_configured"),
    ("swarm.discovery.push_pull_interval", "the_paces_of_the_gossip_are_those_configured"),
    ("swarm.discovery.node_timeout", "the_paces_of_the_gossip_are_those_configured"),
    ("swarm.discovery.dead_node_timeout", "a_killed_node_is_suspect_then_left_then_forgotten"),
    ("swarm.handoff.load_threshold", "a_node_is_overloaded_from_the_threshold_until_clearly_below_it"),
    ("swarm.handoff.enabled", "every_key_of_handoff_and_rpc_acts"),
    ("swarm.handoff.timeout", "every_key_of_handoff_and_rpc_acts"),
    ("swarm.handoff.max_retries", "every_key_of_handoff_and_rpc_acts"),
    ("swarm.handoff.retry_delay", "every_key_of_handoff_and_rpc_acts"),
    ("swarm.rpc.port", "every_key_of_handoff_and_rpc_acts"),
    ("swarm.rpc.timeout", "every_key_of_handoff_and_rpc_acts"),
    ("swarm.load_monitor.enabled", "load_is_measured_reported_and_seen_by_the_others"),
    ("swarm.load_monitor.interval", "load_is_measured_reported_and_seen_by_the_others"),
    ("swarm.load_monitor.sample_size", "the_score_averages_over_the_last_samples"),
    ("swarm.load_monitor.cpu_weight", "the_score_is_the_weighted_sum"),
    ("swarm.load_monitor.memory_weight", "the_score_is_the_weighted_sum"),
    ("swarm.load_monitor.session_weight", "the_score_is_the_weighted_sum"),
    ("swarm.load_monitor.max_sessions", "load_is_measured_reported_and_seen_by_the_others"),
    ("swarm.events.queue", "a_handler_that_hangs_holds_up_nothing_and_loses_the_oldest"),
    ("swarm.events.handlers[].on", "handlers_get_their_events_with_their_payloads"),
    ("swarm.events.handlers[].command", "handlers_get_their_events_with_their_payloads"),
    ("swarm.events.handlers[].webhook", "handlers_get_their_events_with_their_payloads"),
    ("swarm.events.handlers[].timeout", "a_handler_that_hangs_holds_up_nothing_and_loses_the_oldest"),
    ("node_scaling.enabled", "when_a_provider_fails_the_fallback_answers_and_enabled_and_limits_hold"),
    ("node_scaling.listen", "when_a_provider_fails_the_fallback_answers_and_enabled_and_limits_hold"),
    ("node_scaling.limits.max_nodes", "limits_and_cost_reach_the_core_and_its_lanes"),
    ("node_scaling.limits.max_concurrent_api", "limits_and_cost_reach_the_core_and_its_lanes"),
    ("node_scaling.limits.requests_per_minute", "limits_and_cost_reach_the_core_and_its_lanes"),
    ("node_scaling.limits.tokens_per_minute", "limits_and_cost_reach_the_core_and_its_lanes"),
    ("node_scaling.limits.timeout", "limits_and_cost_reach_the_core_and_its_lanes"),
    ("node_scaling.limits.max_attempts", "limits_and_cost_reach_the_core_and_its_lanes"),
    ("node_scaling.limits.hedge", "limits_and_cost_reach_the_core_and_its_lanes"),
    ("node_scaling.provider.name", "every_setting_of_a_provider_acts"),
    ("node_scaling.provider.model", "every_setting_of_a_provider_acts"),
    ("node_scaling.provider.api_key_env", "every_setting_of_a_provider_acts"),
    ("node_scaling.provider.api_key_file", "every_setting_of_a_provider_acts"),
    ("node_scaling.provider.base_url", "every_setting_of_a_provider_acts"),
    ("node_scaling.provider.max_tokens", "every_setting_of_a_provider_acts"),
    ("node_scaling.provider.api_version", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.provider.max_tokens_field", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.fallback[].name", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.fallback[].model", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.fallback[].api_key_env", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.fallback[].api_key_file", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.fallback[].base_url", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.fallback[].api_version", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.fallback[].max_tokens_field", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.fallback[].max_tokens", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.coordinator.name", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.coordinator.model", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.coordinator.api_key_env", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.coordinator.api_key_file", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.coordinator.base_url", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.coordinator.api_version", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.coordinator.max_tokens_field", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    ("node_scaling.coordinator.max_tokens", "provider_fallbacks_and_coordinator_are_all_set_up_as_configured"),
    (
        "node_scaling.cost.max_daily_spend",
        "spending_never_goes_above_max_daily_spend_over_crashes_and_nearly_all_of_it_can_be_used",
    ),
    ("node_scaling.cost.warn_at", "limits_and_cost_reach_the_core_and_its_lanes"),
    ("node_scaling.cost.timezone", "a_day_is_utc_unless_a_timezone_is_given_and_ends_exactly"),
    ("node_scaling.cost.allow_unknown_prices", "limits_and_cost_reach_the_core_and_its_lanes"),
    ("node_scaling.sim.latency", "the_simulated_provider_behaves_as_configured"),
    ("node_scaling.sim.error_rate", "the_simulated_provider_behaves_as_configured"),
    ("node_scaling.sim.requests_per_minute", "the_simulated_provider_behaves_as_configured"),
    ("node_scaling.search.backend", "search_is_set_up_as_configured"),
    ("node_scaling.search.base_url", "search_is_set_up_as_configured"),
    ("node_scaling.search.api_key_env", "search_is_set_up_as_configured"),
    ("node_scaling.search.api_key_file", "search_is_set_up_as_configured"),
    ("node_scaling.search.model", "search_is_set_up_as_configured"),
    ("node_scaling.search.price", "search_is_set_up_as_configured"),
    ("node_scaling.fetch.allow", "fetching_is_set_up_as_configured"),
    ("node_scaling.fetch.max_bytes", "fetching_is_set_up_as_configured"),
    ("node_scaling.fetch.timeout", "fetching_is_set_up_as_configured"),
    ("node_scaling.cache.enabled", "answers_are_kept_as_configured"),
    ("node_scaling.cache.max_bytes", "answers_are_kept_as_configured"),
    ("node_scaling.cache.ttl", "answers_are_kept_as_configured"),
    ("model_pricing.<name>.input_tokens_usd_per_m", "prices_are_those_of_model_pricing_then_the_table_then_unknown"),
    (
        "model_pricing.<name>.cached_input_tokens_usd_per_m",
        "prices_are_those_of_model_pricing_then_the_table_then_unknown",
    ),
    ("model_pricing.<name>.output_tokens_usd_per_m", "prices_are_those_of_model_pricing_then_the_table_then_unknown"),
    (
        "model_pricing.<name>.reasoning_output_tokens_usd_per_m",
        "prices_are_those_of_model_pricing_then_the_table_then_unknown",
    ),
    ("telegram.token_env", "messages_to_a_bot_are_answered_once_whatever_restarts"),
    ("telegram.allow_chats", "messages_to_a_bot_are_answered_once_whatever_restarts"),
    ("telegram.base_url", "messages_to_a_bot_are_answered_once_whatever_restarts"),
    ("telegram.poll_timeout", "messages_to_a_bot_are_answered_once_whatever_restarts"),
    ("telegram.agent", "messages_to_a_bot_are_answered_once_whatever_restarts"),
    ("telegram.entries", "messages_to_a_bot_are_answered_once_whatever_restarts"),
    ("telemetry.otlp_endpoint", "traces_go_where_they_are_told"),
];

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|end| end == "rs") {
            out.push(path);
        }
    }
}

/// The names of all test functions in a file: those with an attribute that ends in `test` above them.
fn tests_of(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut marked = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[") {
            let name = line.trim_start_matches("#[").split(['(', ']']).next().unwrap_or_default();
            marked |= name == "test" || name.ends_with("::test");
        } else if let Some(rest) = line.strip_prefix("async fn ").or_else(|| line.strip_prefix("fn ")) {
            if marked {
                found.extend(rest.split('(').next());
            }
            marked = false;
        } else if !line.starts_with("//") {
            marked = false;
        }
    }
    found
}

#[test]
fn every_key_is_shown_to_act_by_a_test_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut files = Vec::new();
    sources(&root.join("crates"), &mut files);
    sources(&root.join("tests"), &mut files);
    let mut tests: BTreeMap<String, Vec<(PathBuf, String)>> = BTreeMap::new();
    for file in files.iter().filter(|file| !file.ends_with("config/tests/keys.rs")) {
        let text = fs::read_to_string(file).unwrap();
        for test in tests_of(&text) {
            tests.entry(test.to_owned()).or_default().push((file.clone(), text.clone()));
        }
    }
    let named: BTreeSet<String> = SHOWN_BY.iter().map(|(key, _)| (*key).to_owned()).collect();
    let keys: BTreeSet<String> = drover_config::schema().into_iter().map(|key| key.path).collect();
    assert_eq!(named.len(), SHOWN_BY.len(), "a key stands twice in the table");

    let mut wrong: Vec<String> = keys.difference(&named).map(|key| format!("no test shows that {key} acts")).collect();
    wrong.extend(named.difference(&keys).map(|key| format!("there is no key {key}")));
    for (key, test) in SHOWN_BY {
        match tests.get(*test) {
            None => wrong.push(format!("{key}: there is no test {test}")),
            Some(found) if *test != CATALOGUE => {
                // In code it is the field, in a file the key, in the environment the name in capitals. A pure core has
                // settings of its own, with names of its own.
                let leaf = key.rsplit('.').next().unwrap();
                let capitals = format!("__{}", leaf.to_ascii_uppercase());
                let speaks = |(file, text): &(PathBuf, String)| {
                    text.contains(leaf) || text.contains(&capitals) || file.iter().any(|part| part == "core")
                };
                if !found.iter().any(speaks) {
                    wrong.push(format!("{key}: {test} does not speak of it"));
                }
            }
            Some(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}\n{} in all", wrong.join("\n"), wrong.len());
}

#[test]
fn only_functions_with_a_test_attribute_count() {
    let text = "#[test]\nfn a() {}\nfn b() {}\n#[tokio::test(flavor = \"x\")]\n// why\nasync fn c() {}\n#[cfg(test)]\nfn d() {}\n";
    assert_eq!(tests_of(text), ["a", "c"]);
}
