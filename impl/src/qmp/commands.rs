//! The commands: arguments in, effect, result out.

use serde_json::{Map, Value, json};
use std::rc::Rc;

use crate::Layer;
use crate::dirty::commands::{self as bitmaps, BitmapCommand};
use crate::error::{ErrorClass, QmpError};
use crate::graph::blockers::OpType;
use crate::graph::transaction::Action;
use crate::jobs::{BackupArgs, BitmapMode, Job, JobStatus, OnError, Perf, StreamArgs, SyncMode};
use crate::qmp::args::Args;
use crate::qmp::export::ExportArgs;
use crate::qmp::schema::check_blockdev;

/// Every command, in alphabetical order.
const COMMANDS: [&str; 39] = [
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-merge",
    "block-dirty-bitmap-remove",
    "block-export-add",
    "block-export-del",
    "block-job-cancel",
    "block-job-complete",
    "block-job-dismiss",
    "block-job-finalize",
    "block-job-pause",
    "block-job-resume",
    "block-job-set-speed",
    "block-stream",
    "block_resize",
    "blockdev-add",
    "blockdev-backup",
    "blockdev-del",
    "blockdev-reopen",
    "blockdev-snapshot",
    "change-backing-file",
    "job-cancel",
    "job-complete",
    "job-dismiss",
    "job-finalize",
    "job-pause",
    "job-resume",
    "object-add",
    "object-del",
    "query-block-exports",
    "query-block-jobs",
    "query-commands",
    "query-jobs",
    "query-named-block-nodes",
    "transaction",
    "x-debug-block-dirty-bitmap-sha256",
    "x-debug-query-block-graph",
];

impl Layer {
    /// Executes a QMP command. Waits for its turn among the operations of the main context.
    ///
    /// # Errors
    /// Unknown commands, malformed arguments, and the command's own refusals.
    pub async fn execute(&self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let Ok(at) = COMMANDS.binary_search(&command) else {
            return Err(QmpError {
                class: ErrorClass::CommandNotFound,
                desc: format!("The command {command} has not been found"),
            });
        };
        let main = self.main(COMMANDS[at]).await;
        let result = self.dispatch(COMMANDS[at], arguments).await;
        self.reap().await;
        drop(main);
        result
    }

    async fn dispatch(&self, command: &'static str, arguments: &Value) -> Result<Value, QmpError> {
        let mut args = Args::new(arguments)?;
        match command {
            "blockdev-add" => {
                check_blockdev(Args::new(arguments)?)?;
                self.blockdev_add(arguments.as_object().cloned().unwrap_or_default())
                    .await?;
            }
            "blockdev-backup" => {
                let action = Action::Backup(Box::new(backup_args(args)?));
                self.transaction(&[action], false).await?;
            }
            "blockdev-del" => {
                let name = args.str("node-name")?;
                args.finish()?;
                self.blockdev_del(name)?;
            }
            "blockdev-reopen" => {
                let list = reopen_args(args)?;
                self.blockdev_reopen(&list).await?;
            }
            "blockdev-snapshot" => {
                let action = snapshot_args(args)?;
                self.transaction(&[action], false).await?;
            }
            "transaction" => {
                let (actions, grouped) = transaction_args(args)?;
                self.transaction(&actions, grouped).await?;
            }
            "object-add" => self.object_add(args)?,
            "object-del" => self.object_del(args)?,
            "block_resize" => self.block_resize(args).await?,
            "block-stream" => self.block_stream(stream_args(args)?).await?,
            "change-backing-file" => self.change_backing_file(args).await?,
            "block-export-add" => self.export_add(ExportArgs::read(args)?).await?,
            "block-export-del" => {
                let id = args.str("id")?;
                args.opt_enum("mode", &[("safe", ()), ("hard", ())])?;
                args.finish()?;
                self.export_del(id).await?;
            }
            _ if bitmaps::NAMES.contains(&command) => {
                let command = BitmapCommand::read(command, args)?;
                self.bitmap_command(&command).await?;
            }
            "x-debug-block-dirty-bitmap-sha256" => {
                let (node, name) = (args.str("node")?, args.str("name")?);
                args.finish()?;
                let (_, bitmap) = self.find_bitmap(node, name)?;
                return Ok(json!({"sha256": bitmap.sha256()}));
            }
            _ if command.starts_with("block-job-") || command.starts_with("job-") => {
                self.job_command(command, args).await?;
            }
            _ => return self.query(command, args),
        }
        Ok(json!({}))
    }

    fn query(&self, command: &str, mut args: Args<'_>) -> Result<Value, QmpError> {
        if command == "query-named-block-nodes" {
            args.opt_bool("flat")?;
        }
        args.finish()?;
        Ok(match command {
            "query-block-exports" => self.query_exports(),
            "query-block-jobs" => self.jobs().iter().map(|job| job.block_info()).collect(),
            "query-commands" => COMMANDS.iter().map(|name| json!({"name": name})).collect(),
            "query-jobs" => self.jobs().iter().map(|job| job.info()).collect(),
            "query-named-block-nodes" => self.query_nodes(),
            "x-debug-query-block-graph" => self.query_graph(),
            _ => unreachable!("{command} is in the table of commands"),
        })
    }

    async fn job_command(&self, command: &str, mut args: Args<'_>) -> Result<(), QmpError> {
        let (block, verb) = match command.strip_prefix("block-job-") {
            Some(verb) => (true, verb),
            None => (false, command.strip_prefix("job-").expect("a job command")),
        };
        let by_device = block && !matches!(verb, "finalize" | "dismiss");
        let id = args.str(if by_device { "device" } else { "id" })?;
        let speed = if verb == "set-speed" {
            args.int("speed")?
        } else {
            0
        };
        let force = if verb == "cancel" && block {
            args.opt_bool("force")?.unwrap_or(false)
        } else {
            true
        };
        args.finish()?;
        let job = self.find_job(id, block)?;
        match verb {
            "cancel" if block => job.block_job_cancel(force).await,
            "cancel" => job.cancel_by_verb().await,
            "complete" => job.complete(),
            "dismiss" => job.dismiss(),
            "finalize" => job.finalize().await,
            "pause" => job.user_pause(),
            "resume" => job.user_resume(),
            "set-speed" => job.set_speed(speed),
            _ => unreachable!("{command} is in the table of commands"),
        }
    }

    fn find_job(&self, id: &str, block: bool) -> Result<Rc<Job>, QmpError> {
        self.job(id).ok_or_else(|| {
            if block {
                QmpError {
                    class: ErrorClass::DeviceNotActive,
                    desc: format!("Block job '{id}' not found"),
                }
            } else {
                QmpError::generic("Job not found")
            }
        })
    }

    /// Rewrites the backing file name in a header; the graph stays.
    async fn change_backing_file(&self, mut args: Args<'_>) -> Result<(), QmpError> {
        let device = args.str("device")?;
        let image_name = args.str("image-node-name")?;
        let file = args.str("backing-file")?;
        args.finish()?;
        let root = self.lookup(device, device)?;
        if !self.is_root_node(root) {
            return Err(QmpError::generic("Need a root block node"));
        }
        let image = self.lookup("", image_name)?;
        if self.find_base(image) == image {
            return Err(QmpError::generic(
                "not allowing backing file change on an image without a backing file",
            ));
        }
        self.op_blocked(root, OpType::Change)?;
        if !self.chain_contains(root, image) {
            return Err(QmpError::generic(format!(
                "'{device}' and image file are not in the same chain"
            )));
        }
        let was_read_only = !self.node(image).is_writable();
        let before = self.before_writable(image);
        if was_read_only {
            self.set_read_only(image, false).await?;
        }
        let written = self.write_backing_file(image, file).await;
        let restored = if was_read_only {
            self.undo_writable(image, written.is_err().then_some(before))
                .await
        } else {
            Ok(())
        };
        written.and(restored)
    }

    async fn write_backing_file(&self, image: crate::types::NodeId, file: &str) -> Result<(), QmpError> {
        let node = self.node(image);
        // QEMU records the image's own format here, which is wrong for a raw backing file (graph quirk 10).
        let backing = self
            .cow(image)
            .map(|below| self.node(self.skip_filters(below)).facts.name);
        let _read = self.graph_read().await;
        let written = node
            .driver()
            .change_backing_file(&self.cx(&node), Some((file, backing)))
            .await;
        written.map_err(|errno| QmpError::errno(&format!("Could not change backing file to '{file}'"), errno))
    }

    /// Ends everything: exports, jobs (hard-cancelled), nodes. Afterwards the layer is empty.
    ///
    /// The caller starts no command meanwhile.
    ///
    /// # Panics
    /// When a node is still referenced in the end: a leak, and a bug of ours.
    pub async fn shutdown(&self) {
        let main = self.main("shutdown").await;
        self.close_exports().await;
        self.reap().await;
        drop(main);
        while let Some(job) = self.jobs().first() {
            self.cancel_and_wait(job).await;
        }
        let main = self.main("shutdown").await;
        for node in self.nodes().iter().rev() {
            if node.monitor_owned.replace(false) {
                self.unhold(node.id);
            }
        }
        self.reap().await;
        let left: Vec<_> = self.nodes().iter().map(|node| node.name.clone()).collect();
        assert!(left.is_empty(), "nodes are still referenced: {left:?}");
        self.drop_throttle_groups();
        drop(main);
    }

    /// The job's task needs the main lock to finish, so the wait happens without it.
    async fn cancel_and_wait(&self, job: &Rc<Job>) {
        let main = self.main("shutdown").await;
        let waits = matches!(job.status(), JobStatus::Waiting | JobStatus::Pending);
        if !job.status().is_completed() || waits {
            job.cancel().await;
        }
        self.reap().await;
        drop(main);
        let over = |job: &Job| matches!(job.status(), JobStatus::Concluded | JobStatus::Null);
        loop {
            let listen = self.inner.idle.listen();
            if over(job) {
                break;
            }
            listen.await;
        }
        let main = self.main("shutdown").await;
        if job.status() == JobStatus::Concluded {
            job.forget();
        }
        self.reap().await;
        drop(main);
    }
}

/// The definitions of a reopen, each checked against the schema.
fn reopen_args(mut args: Args<'_>) -> Result<Vec<&Map<String, Value>>, QmpError> {
    let mut options = Vec::new();
    for item in args.objects("options")? {
        let (map, path) = item?;
        check_blockdev(Args::at(map, path))?;
        options.push(map);
    }
    args.finish()?;
    Ok(options)
}

fn snapshot_args(mut args: Args<'_>) -> Result<Action, QmpError> {
    let (node, overlay) = (args.str("node")?.to_owned(), args.str("overlay")?.to_owned());
    args.finish()?;
    Ok(Action::Snapshot { node, overlay })
}

/// The actions, and whether their jobs succeed or fail together.
fn transaction_args(mut args: Args<'_>) -> Result<(Vec<Action>, bool), QmpError> {
    let others = ["abort", "blockdev-backup", "blockdev-snapshot"].map(|name| (name, name));
    let known = [&others[..], &bitmaps::NAMES.map(|name| (name, name))].concat();
    let mut actions = Vec::new();
    let mut alone = None;
    for item in args.objects("actions")? {
        let (map, path) = item?;
        let mut action = Args::at(map, path);
        action.require("type")?;
        let name = action.opt_enum("type", &known)?.expect("just required");
        action.require("data")?;
        let data = action.opt_object("data")?.expect("just required");
        actions.push(match name {
            "abort" => {
                data.finish()?;
                Action::Abort
            }
            "blockdev-backup" => Action::Backup(Box::new(backup_args(data)?)),
            "blockdev-snapshot" => snapshot_args(data)?,
            _ => Action::Bitmap(BitmapCommand::read(name, data)?),
        });
        if name != "blockdev-backup" {
            alone = alone.or(Some(name));
        }
        action.finish()?;
    }
    let mut grouped = false;
    if let Some(mut properties) = args.opt_object("properties")? {
        let modes = [("individual", false), ("grouped", true)];
        grouped = properties.opt_enum("completion-mode", &modes)?.unwrap_or(false);
        properties.finish()?;
    }
    args.finish()?;
    match alone {
        Some(name) if grouped => Err(QmpError::generic(format!(
            "Action '{name}' does not support transaction property completion-mode = grouped"
        ))),
        _ => Ok((actions, grouped)),
    }
}

fn stream_args(mut args: Args<'_>) -> Result<StreamArgs, QmpError> {
    let stream = StreamArgs {
        job_id: args.opt_string("job-id")?,
        device: args.str("device")?.to_owned(),
        base: args.opt_string("base")?,
        base_node: args.opt_string("base-node")?,
        backing_file: args.opt_string("backing-file")?,
        backing_mask_protocol: args.opt_bool("backing-mask-protocol")?.unwrap_or(false),
        bottom: args.opt_string("bottom")?,
        speed: args.opt_int("speed")?.unwrap_or(0),
        on_error: args.opt_enum("on-error", &OnError::NAMES)?.unwrap_or_default(),
        filter_node_name: args.opt_string("filter-node-name")?,
        auto_finalize: args.opt_bool("auto-finalize")?.unwrap_or(true),
        auto_dismiss: args.opt_bool("auto-dismiss")?.unwrap_or(true),
    };
    args.finish()?;
    Ok(stream)
}

fn backup_args(mut args: Args<'_>) -> Result<BackupArgs, QmpError> {
    let job_id = args.opt_string("job-id")?;
    let device = args.str("device")?.to_owned();
    args.require("sync")?;
    let mut backup = BackupArgs {
        job_id,
        device,
        sync: args.opt_enum("sync", &SyncMode::NAMES)?.expect("just required"),
        speed: args.opt_int("speed")?.unwrap_or(0),
        bitmap: args.opt_string("bitmap")?,
        bitmap_mode: args.opt_enum("bitmap-mode", &BitmapMode::NAMES)?,
        compress: args.opt_bool("compress")?.unwrap_or(false),
        on_source_error: args
            .opt_enum("on-source-error", &OnError::NAMES)?
            .unwrap_or_default(),
        on_target_error: args
            .opt_enum("on-target-error", &OnError::NAMES)?
            .unwrap_or_default(),
        auto_finalize: args.opt_bool("auto-finalize")?.unwrap_or(true),
        auto_dismiss: args.opt_bool("auto-dismiss")?.unwrap_or(true),
        filter_node_name: args.opt_string("filter-node-name")?,
        discard_source: args.opt_bool("discard-source")?.unwrap_or(false),
        perf: Perf::default(),
        target: String::new(),
    };
    if let Some(mut perf) = args.opt_object("x-perf")? {
        backup.perf = Perf {
            use_copy_range: perf.opt_bool("use-copy-range")?.unwrap_or(false),
            max_workers: perf
                .opt_int("max-workers")?
                .unwrap_or(Perf::default().max_workers),
            max_chunk: perf.opt_int("max-chunk")?.unwrap_or(0),
            min_cluster_size: perf.opt_u64("min-cluster-size")?.unwrap_or(0),
        };
        perf.finish()?;
    }
    args.str("target")?.clone_into(&mut backup.target);
    args.finish()?;
    Ok(backup)
}
