-- A router's file as version 1 of the tables had it: one swarm at work with a question that waits, one that has ended.
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE words (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, at INTEGER NOT NULL, name INTEGER NOT NULL, swarm INTEGER, job INTEGER, node INTEGER,
    injection, data BLOB NOT NULL);
CREATE TABLE requests (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, launch INTEGER NOT NULL, swarm INTEGER NOT NULL,
    content TEXT NOT NULL, steer INTEGER NOT NULL, trace TEXT NOT NULL, created INTEGER NOT NULL);
CREATE INDEX requests_by_swarm ON requests (swarm);
CREATE TABLE swarms (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, request INTEGER NOT NULL, spec BLOB NOT NULL,
    facts TEXT NOT NULL);
CREATE TABLE nodes (
    swarm INTEGER NOT NULL, node INTEGER NOT NULL, facts TEXT NOT NULL, PRIMARY KEY (swarm, node)) WITHOUT ROWID;
CREATE TABLE streams (
    swarm INTEGER NOT NULL, node INTEGER NOT NULL, generation INTEGER NOT NULL, segment INTEGER NOT NULL,
    offset INTEGER NOT NULL, seq INTEGER NOT NULL, closed INTEGER NOT NULL, superseded INTEGER NOT NULL,
    PRIMARY KEY (swarm, node, generation)) WITHOUT ROWID;
CREATE TABLE injections (
    id TEXT PRIMARY KEY, swarm INTEGER NOT NULL, node INTEGER NOT NULL, request INTEGER NOT NULL, state TEXT NOT NULL,
    inbox_seq INTEGER NOT NULL, spoken INTEGER NOT NULL, ack_seq INTEGER NOT NULL, delivered_seq INTEGER NOT NULL,
    end_seq INTEGER NOT NULL, error TEXT NOT NULL, assistant_seen INTEGER NOT NULL, last_usage INTEGER,
    created INTEGER NOT NULL, since INTEGER NOT NULL);
CREATE INDEX injections_by_request ON injections (request);
CREATE INDEX injections_open ON injections (swarm, node) WHERE end_seq = 0;
CREATE TABLE controls (
    swarm INTEGER NOT NULL, node INTEGER NOT NULL, seq INTEGER NOT NULL, injection TEXT, kind TEXT NOT NULL,
    data TEXT NOT NULL, PRIMARY KEY (swarm, node, seq)) WITHOUT ROWID;
CREATE TABLE approvals (id TEXT PRIMARY KEY, swarm INTEGER NOT NULL, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE leftovers (swarm_id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO words VALUES (1, 'swarm_launch_progress');
INSERT INTO words VALUES (2, 'e94ce89c-f0a4-4102-b3c2-dca1a6e17c0c');
INSERT INTO words VALUES (3, 'local-cc9deff8bcd2');
INSERT INTO words VALUES (4, 'worker_hello');
INSERT INTO words VALUES (5, 'swarm_launched');
INSERT INTO words VALUES (6, 'inject_ack');
INSERT INTO words VALUES (7, 'inject_delivered');
INSERT INTO words VALUES (8, 'thread_status');
INSERT INTO words VALUES (9, 'turn_started');
INSERT INTO words VALUES (10, 'assistant_delta');
INSERT INTO words VALUES (11, 'usage');
INSERT INTO words VALUES (12, 'assistant');
INSERT INTO words VALUES (13, 'turn_complete');
INSERT INTO words VALUES (14, 'exec_approval_required');
INSERT INTO words VALUES (15, '0062602d-3ea0-46c0-9ff6-e634708bde58');
INSERT INTO words VALUES (16, 'local-4ee1ed08732a');
INSERT INTO words VALUES (17, 'swarm_status');
INSERT INTO words VALUES (18, 'swarm_terminate_progress');
INSERT INTO words VALUES (19, 'worker_bye');
INSERT INTO words VALUES (20, 'swarm_terminated');
INSERT INTO events VALUES (1, 1795258519056295, 1, 2, NULL, NULL, NULL, CAST('{"message":"the launch is recorded","provider":"","provider_id":"","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09","stage":"queued","swarm_id":"e94ce89c-f0a4-4102-b3c2-dca1a6e17c0c","timestamp":1795258519.056295}' AS BLOB));
INSERT INTO events VALUES (2, 1795258519064842, 1, 2, NULL, NULL, NULL, CAST('{"message":"2 workers on this machine, agent echo","provider":"","provider_id":"","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09","stage":"starting","swarm_id":"e94ce89c-f0a4-4102-b3c2-dca1a6e17c0c","timestamp":1795258519.064842}' AS BLOB));
INSERT INTO events VALUES (3, 1795258519088171, 1, 2, NULL, NULL, NULL, CAST('{"message":"directories and bundles are in place","provider":"","provider_id":"","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09","stage":"config","swarm_id":"e94ce89c-f0a4-4102-b3c2-dca1a6e17c0c","timestamp":1795258519.088171}' AS BLOB));
INSERT INTO events VALUES (4, 1795258519119181, 1, 2, 3, NULL, NULL, CAST('{"message":"node 0 is process 7656; 1 of 2 run","provider":"local","provider_id":"local","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09","stage":"submitting","swarm_id":"e94ce89c-f0a4-4102-b3c2-dca1a6e17c0c","timestamp":1795258519.119181}' AS BLOB));
INSERT INTO events VALUES (5, 1795258519119235, 1, 2, 3, NULL, NULL, CAST('{"message":"node 1 is process 7657; 2 of 2 run","provider":"local","provider_id":"local","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09","stage":"submitting","swarm_id":"e94ce89c-f0a4-4102-b3c2-dca1a6e17c0c","timestamp":1795258519.119235}' AS BLOB));
INSERT INTO events VALUES (6, 1795258519119247, 1, 2, 3, NULL, NULL, CAST('{"message":"2 of 2 workers run","provider":"local","provider_id":"local","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09","stage":"ready","swarm_id":"e94ce89c-f0a4-4102-b3c2-dca1a6e17c0c","timestamp":1795258519.119247}' AS BLOB));
INSERT INTO events VALUES (7, 1795258519199848, 4, 2, 3, 1, NULL, CAST('{"agent":"echo","detail":{"agent":"echo"},"host":"vm","inbox_seq":0,"pid":7657,"version":"0.1.0"}' AS BLOB));
INSERT INTO events VALUES (8, 1795258519202481, 4, 2, 3, 0, NULL, CAST('{"agent":"echo","detail":{"agent":"echo"},"host":"vm","inbox_seq":0,"pid":7656,"version":"0.1.0"}' AS BLOB));
INSERT INTO events VALUES (9, 1795258519202481, 5, 2, 3, NULL, NULL, CAST('{"agent_model":null,"agent_runtime":"echo","job_id":"local-cc9deff8bcd2","node_count":2,"partition":"","pricing_model":null,"provider":"local","provider_id":"local","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09","status":"running","swarm_id":"e94ce89c-f0a4-4102-b3c2-dca1a6e17c0c","time":""}' AS BLOB));
INSERT INTO events VALUES (10, 1795258519202481, 6, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{"prompt":"You count.","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09"}' AS BLOB));
INSERT INTO events VALUES (11, 1795258519202481, 6, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{"prompt":"You count.","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09"}' AS BLOB));
INSERT INTO events VALUES (12, 1795258519212469, 7, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{"request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09"}' AS BLOB));
INSERT INTO events VALUES (13, 1795258519214081, 8, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{"status":{"type":"active"}}' AS BLOB));
INSERT INTO events VALUES (14, 1795258519214081, 9, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{}' AS BLOB));
INSERT INTO events VALUES (15, 1795258519214102, 7, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{"request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09"}' AS BLOB));
INSERT INTO events VALUES (16, 1795258519220849, 8, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{"status":{"type":"active"}}' AS BLOB));
INSERT INTO events VALUES (17, 1795258519220849, 9, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{}' AS BLOB));
INSERT INTO events VALUES (18, 1795258519231981, 10, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{"content":"You "}' AS BLOB));
INSERT INTO events VALUES (19, 1795258519234019, 10, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{"content":"You "}' AS BLOB));
INSERT INTO events VALUES (20, 1795258519234019, 10, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{"content":"count."}' AS BLOB));
INSERT INTO events VALUES (21, 1795258519234019, 11, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{"last_input_tokens":2,"last_output_tokens":2,"last_total_tokens":4,"total_tokens":4}' AS BLOB));
INSERT INTO events VALUES (22, 1795258519234019, 12, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{"content":"You count.","final_answer":true}' AS BLOB));
INSERT INTO events VALUES (23, 1795258519234019, 13, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{"duration_ms":21,"status":"completed"}' AS BLOB));
INSERT INTO events VALUES (24, 1795258519234019, 8, 2, 3, 1, x'9a9b65aa315c4d1d8bf9c09c3c03828a', CAST('{"status":{"type":"idle"}}' AS BLOB));
INSERT INTO events VALUES (25, 1795258519234062, 10, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{"content":"count."}' AS BLOB));
INSERT INTO events VALUES (26, 1795258519234062, 11, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{"last_input_tokens":2,"last_output_tokens":2,"last_total_tokens":4,"total_tokens":4}' AS BLOB));
INSERT INTO events VALUES (27, 1795258519234062, 12, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{"content":"You count.","final_answer":true}' AS BLOB));
INSERT INTO events VALUES (28, 1795258519234062, 13, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{"duration_ms":19,"status":"completed"}' AS BLOB));
INSERT INTO events VALUES (29, 1795258519234062, 8, 2, 3, 0, x'6927c02088464af7bcc319f1e7032fe0', CAST('{"status":{"type":"idle"}}' AS BLOB));
INSERT INTO events VALUES (30, 1795258520060429, 6, 2, 3, 0, x'6d39fbd9bdf64547a0b51074913a8f40', CAST('{"prompt":"hello","request_id":"baaa1bc7-62bc-4326-85b6-cc1d655e70e3"}' AS BLOB));
INSERT INTO events VALUES (31, 1795258520067366, 7, 2, 3, 0, x'6d39fbd9bdf64547a0b51074913a8f40', CAST('{"request_id":"baaa1bc7-62bc-4326-85b6-cc1d655e70e3"}' AS BLOB));
INSERT INTO events VALUES (32, 1795258520081558, 8, 2, 3, 0, x'6d39fbd9bdf64547a0b51074913a8f40', CAST('{"status":{"type":"active"}}' AS BLOB));
INSERT INTO events VALUES (33, 1795258520081558, 9, 2, 3, 0, x'6d39fbd9bdf64547a0b51074913a8f40', CAST('{}' AS BLOB));
INSERT INTO events VALUES (34, 1795258520081595, 10, 2, 3, 0, x'6d39fbd9bdf64547a0b51074913a8f40', CAST('{"content":"hello"}' AS BLOB));
INSERT INTO events VALUES (35, 1795258520082485, 11, 2, 3, 0, x'6d39fbd9bdf64547a0b51074913a8f40', CAST('{"last_input_tokens":1,"last_output_tokens":1,"last_total_tokens":2,"total_tokens":6}' AS BLOB));
INSERT INTO events VALUES (36, 1795258520082485, 12, 2, 3, 0, x'6d39fbd9bdf64547a0b51074913a8f40', CAST('{"content":"hello","final_answer":true}' AS BLOB));
INSERT INTO events VALUES (37, 1795258520082485, 13, 2, 3, 0, x'6d39fbd9bdf64547a0b51074913a8f40', CAST('{"duration_ms":14,"status":"completed"}' AS BLOB));
INSERT INTO events VALUES (38, 1795258520082485, 8, 2, 3, 0, x'6d39fbd9bdf64547a0b51074913a8f40', CAST('{"status":{"type":"idle"}}' AS BLOB));
INSERT INTO events VALUES (39, 1795258520151063, 6, 2, 3, 1, x'acc77cb4aed24246b5d6683336757fa9', CAST('{"prompt":"@echo approval=ls","request_id":"ad27387e-5726-4470-b199-8f35d552ed6e"}' AS BLOB));
INSERT INTO events VALUES (40, 1795258520178804, 7, 2, 3, 1, x'acc77cb4aed24246b5d6683336757fa9', CAST('{"request_id":"ad27387e-5726-4470-b199-8f35d552ed6e"}' AS BLOB));
INSERT INTO events VALUES (41, 1795258520183920, 8, 2, 3, 1, x'acc77cb4aed24246b5d6683336757fa9', CAST('{"status":{"type":"active"}}' AS BLOB));
INSERT INTO events VALUES (42, 1795258520183920, 9, 2, 3, 1, x'acc77cb4aed24246b5d6683336757fa9', CAST('{}' AS BLOB));
INSERT INTO events VALUES (43, 1795258520191370, 14, 2, 3, 1, x'acc77cb4aed24246b5d6683336757fa9', CAST('{"approval_id":"acc77cb4-aed2-4246-b5d6-683336757fa9-0","approvals_version":1,"available_decisions":["accept","decline"],"call_id":"call-0-acc77cb4-aed2-4246-b5d6-683336757fa9","command":"ls","reason":"the prompt asked for it","turn_id":"acc77cb4-aed2-4246-b5d6-683336757fa9"}' AS BLOB));
INSERT INTO events VALUES (44, 1795258526215089, 1, 15, NULL, NULL, NULL, CAST('{"message":"the launch is recorded","provider":"","provider_id":"","request_id":"c753632c-f5c9-4e3d-afb8-37429007f031","stage":"queued","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58","timestamp":1795258526.215089}' AS BLOB));
INSERT INTO events VALUES (45, 1795258526221781, 1, 15, NULL, NULL, NULL, CAST('{"message":"1 workers on this machine, agent echo","provider":"","provider_id":"","request_id":"c753632c-f5c9-4e3d-afb8-37429007f031","stage":"starting","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58","timestamp":1795258526.221781}' AS BLOB));
INSERT INTO events VALUES (46, 1795258526223546, 1, 15, NULL, NULL, NULL, CAST('{"message":"directories and bundles are in place","provider":"","provider_id":"","request_id":"c753632c-f5c9-4e3d-afb8-37429007f031","stage":"config","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58","timestamp":1795258526.223546}' AS BLOB));
INSERT INTO events VALUES (47, 1795258526267737, 1, 15, 16, NULL, NULL, CAST('{"message":"node 0 is process 8258; 1 of 1 run","provider":"local","provider_id":"local","request_id":"c753632c-f5c9-4e3d-afb8-37429007f031","stage":"submitting","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58","timestamp":1795258526.267737}' AS BLOB));
INSERT INTO events VALUES (48, 1795258526267791, 1, 15, 16, NULL, NULL, CAST('{"message":"1 of 1 workers run","provider":"local","provider_id":"local","request_id":"c753632c-f5c9-4e3d-afb8-37429007f031","stage":"ready","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58","timestamp":1795258526.267791}' AS BLOB));
INSERT INTO events VALUES (49, 1795258526324582, 4, 15, 16, 0, NULL, CAST('{"agent":"echo","detail":{"agent":"echo"},"host":"vm","inbox_seq":0,"pid":8258,"version":"0.1.0"}' AS BLOB));
INSERT INTO events VALUES (50, 1795258526324582, 5, 15, 16, NULL, NULL, CAST('{"agent_model":null,"agent_runtime":"echo","job_id":"local-4ee1ed08732a","node_count":1,"partition":"","pricing_model":null,"provider":"local","provider_id":"local","request_id":"c753632c-f5c9-4e3d-afb8-37429007f031","status":"running","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58","time":""}' AS BLOB));
INSERT INTO events VALUES (51, 1795258527164343, 17, 15, 16, NULL, NULL, CAST('{"job_id":"local-4ee1ed08732a","node_count":1,"request_id":"2c0ea5dd-369b-484f-867f-08d4ce4c19f1","status":"terminating","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58"}' AS BLOB));
INSERT INTO events VALUES (52, 1795258527164343, 18, 15, 16, NULL, NULL, CAST('{"job_id":"local-4ee1ed08732a","message":"no prompt is open","provider_backend":"local","request_id":"2c0ea5dd-369b-484f-867f-08d4ce4c19f1","stage":"quiescent","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58","timestamp":1795258527.164343}' AS BLOB));
INSERT INTO events VALUES (53, 1795258527164343, 18, 15, 16, NULL, NULL, CAST('{"job_id":"local-4ee1ed08732a","message":"releasing its allocation","provider_backend":"local","request_id":"2c0ea5dd-369b-484f-867f-08d4ce4c19f1","stage":"provider_terminate","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58","timestamp":1795258527.164343}' AS BLOB));
INSERT INTO events VALUES (54, 1795258527173274, 19, 15, 16, 0, NULL, CAST('{"reason":"the swarm is terminated"}' AS BLOB));
INSERT INTO events VALUES (55, 1795258527195535, 20, 15, 16, NULL, NULL, CAST('{"job_id":"local-4ee1ed08732a","reason":"terminated as asked","request_id":"2c0ea5dd-369b-484f-867f-08d4ce4c19f1","swarm_id":"0062602d-3ea0-46c0-9ff6-e634708bde58"}' AS BLOB));
INSERT INTO requests VALUES (2, 'e3dace09-d48a-409a-9e28-b5b7e1513a09', 1, 1, 'You count.', 0, '00-b61236c5a3aa4626bfb6b1a4dcab8db7-1d36a210b40245fe-01', 1795258519056295);
INSERT INTO requests VALUES (3, 'baaa1bc7-62bc-4326-85b6-cc1d655e70e3', 0, 1, 'hello', 0, '00-89d5b50c0bbd4df09572992eac4e88f3-7045df3c12254910-01', 1795258520060429);
INSERT INTO requests VALUES (4, 'ad27387e-5726-4470-b199-8f35d552ed6e', 0, 1, '@echo approval=ls', 0, '00-2b0f782aaa14470e9b10993cca947bce-761ca535de15497a-01', 1795258520151063);
INSERT INTO requests VALUES (6, 'c753632c-f5c9-4e3d-afb8-37429007f031', 1, 5, '', 0, '00-fa6b39c3edd1456e8654f32d988ed37f-b37923ae583e4f39-01', 1795258526215089);
INSERT INTO swarms VALUES (1, 'e94ce89c-f0a4-4102-b3c2-dca1a6e17c0c', 'local-cc9deff8bcd2', 2, x'0802120a596f7520636f756e742e1a046563686f', '{"status":"running","reason":"","request_id":"e3dace09-d48a-409a-9e28-b5b7e1513a09","trace":"00-b61236c5a3aa4626bfb6b1a4dcab8db7-1d36a210b40245fe-01","backend_state":"RUNNING","provider":"local","provider_id":"local","agent":"echo","created":1795258519056295,"ended":0,"launched":true,"launch_seq":9,"running_since":1795258519119142,"ensured_at":1795258519122932,"over_since":0,"over_reason":"","owes_release":null,"ending":null,"trouble":null}');
INSERT INTO swarms VALUES (5, '0062602d-3ea0-46c0-9ff6-e634708bde58', 'local-4ee1ed08732a', 6, x'08011a046563686f', '{"status":"terminated","reason":"terminated as asked","request_id":"c753632c-f5c9-4e3d-afb8-37429007f031","trace":"00-fa6b39c3edd1456e8654f32d988ed37f-b37923ae583e4f39-01","backend_state":"COMPLETED","provider":"local","provider_id":"local","agent":"echo","created":1795258526215089,"ended":1795258527195535,"launched":true,"launch_seq":50,"running_since":1795258526267701,"ensured_at":1795258526269267,"over_since":1795258527195535,"over_reason":"released","owes_release":null,"ending":null,"trouble":null}');
INSERT INTO nodes VALUES (1, 0, '{"host":"vm","pid":7656,"state":2,"generation":1,"restarts":0,"reason":"","hello":1,"bye":0,"gave_up":0,"trouble":null,"inbox_seq":2,"failed_since":0}');
INSERT INTO nodes VALUES (1, 1, '{"host":"vm","pid":7657,"state":2,"generation":1,"restarts":0,"reason":"","hello":1,"bye":0,"gave_up":0,"trouble":null,"inbox_seq":2,"failed_since":0}');
INSERT INTO nodes VALUES (5, 0, '{"host":"vm","pid":0,"state":4,"generation":1,"restarts":0,"reason":"worker ended with exit code 0","hello":1,"bye":1,"gave_up":0,"trouble":null,"inbox_seq":1,"failed_since":0}');
INSERT INTO streams VALUES (1, 0, 1, 1, 4287, 16, 0, 0);
INSERT INTO streams VALUES (1, 1, 1, 1, 3392, 12, 0, 0);
INSERT INTO streams VALUES (5, 0, 1, 1, 367, 2, 0, 0);
INSERT INTO injections VALUES ('6927c020-8846-4af7-bcc3-19f1e7032fe0', 1, 0, 2, 'completed', 1, 1, 10, 15, 28, '', 1, 4, 1795258519202481, 1795258519234062);
INSERT INTO injections VALUES ('9a9b65aa-315c-4d1d-8bf9-c09c3c03828a', 1, 1, 2, 'completed', 1, 1, 11, 12, 23, '', 1, 4, 1795258519202481, 1795258519234019);
INSERT INTO injections VALUES ('6d39fbd9-bdf6-4547-a0b5-1074913a8f40', 1, 0, 3, 'completed', 2, 1, 30, 31, 37, '', 1, 6, 1795258520060429, 1795258520082485);
INSERT INTO injections VALUES ('acc77cb4-aed2-4246-b5d6-683336757fa9', 1, 1, 4, 'started', 2, 1, 39, 40, 0, '', 0, NULL, 1795258520151063, 1795258520169308);
INSERT INTO approvals VALUES ('acc77cb4-aed2-4246-b5d6-683336757fa9-0', 1, '{"id":"acc77cb4-aed2-4246-b5d6-683336757fa9-0","swarm":1,"node":1,"generation":1,"injection":"acc77cb4-aed2-4246-b5d6-683336757fa9","call_id":"call-0-acc77cb4-aed2-4246-b5d6-683336757fa9","status":"pending","created":1795258520191370,"updated":1795258520191370,"data":"{\"approval_id\":\"acc77cb4-aed2-4246-b5d6-683336757fa9-0\",\"approvals_version\":1,\"available_decisions\":[\"accept\",\"decline\"],\"call_id\":\"call-0-acc77cb4-aed2-4246-b5d6-683336757fa9\",\"command\":\"ls\",\"reason\":\"the prompt asked for it\",\"turn_id\":\"acc77cb4-aed2-4246-b5d6-683336757fa9\"}","decision":""}');
PRAGMA user_version = 1;
