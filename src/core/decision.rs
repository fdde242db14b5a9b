//! Decides about one pod: the only place that runs identify, look up, resolve and plan in sequence. The webhook,
//! `review`, `resolve`, `audit`, the benchmarks and the tests call it and format the [`Decision`]. The lookup is
//! executed in database/; each other step has its own file.

use super::admission::{AdmissionTarget, Decoded, Request};
use super::identity::{Identity, ParameterValue, identify};
use super::placeholders::{Columns, Workspace};
use super::plan::{Plan, Scope, plan};
use super::pod::Pod;
use super::policy::Policy;
use super::policy_file::OnError;
use super::refusal::Refusal;
use super::resolution::{LookupOutcome, Reason, Resolution};
use super::warning::Warning;

/// The webhook that is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Webhook {
    /// Patches a pod.
    Mutate,
    /// Rejects a pod whose containers would still change.
    Validate,
}

impl Webhook {
    /// Returns the name in logs, traces and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mutate => "mutate",
            Self::Validate => "validate",
        }
    }
}

/// The result for one pod.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The request adds no containers to a pod; it is allowed.
    NotApplicable,
    /// The pod belongs to no workspace; it is allowed.
    NotAWorkspace,
    /// The pod needs no change; it is allowed.
    Unchanged,
    /// The pod is allowed with the plan's changes.
    Patched,
    /// The pod is refused.
    Refused(Refusal),
}

impl Outcome {
    /// Returns the name in logs, traces and metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::NotApplicable | Self::NotAWorkspace => "untouched",
            Self::Unchanged => "unchanged",
            Self::Patched => "patched",
            Self::Refused(_) => "refused",
        }
    }

    /// Returns why the pod is refused, if it is.
    #[must_use]
    pub const fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            Self::NotApplicable | Self::NotAWorkspace | Self::Unchanged | Self::Patched => None,
        }
    }
}

/// The whole answer to one review. No `Debug`: the plan may hold a token.
pub struct Decision<'a> {
    /// The workspace id in the pod's label, of any length; empty if there is none.
    pub workspace: &'a str,
    /// The resolved mode; `None` if the decision needed none.
    pub resolution: Option<Resolution>,
    /// The result.
    pub outcome: Outcome,
    /// The changes and warnings; `None` if nothing was planned or the webhook is [`Webhook::Validate`].
    pub plan: Option<Plan<'a>>,
}

/// A decision's labels in logs, traces and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Labels {
    /// The resolved mode, or [`NONE`].
    pub mode: &'static str,
    /// Where the mode comes from, or [`NONE`].
    pub source: &'static str,
    /// The rule that gave the mode, or [`NONE`].
    pub reason: &'static str,
    /// The outcome.
    pub outcome: &'static str,
}

/// The label for a decision without mode, source and reason.
pub const NONE: &str = "none";

impl Decision<'_> {
    /// Returns the warnings for the person who creates the pod.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        let plan = self.plan.as_ref();
        plan.map_or(&[], |plan| &plan.warnings)
    }

    /// Returns the labels for logs, traces and metrics.
    #[must_use]
    pub fn labels(&self) -> Labels {
        let (mode, source, reason) = match &self.resolution {
            None => (NONE, NONE, NONE),
            Some(resolution) => {
                (resolution.mode.as_str(), resolution.source.as_str(), resolution.reason.as_str())
            }
        };
        Labels {
            mode,
            source,
            reason,
            outcome: self.outcome.as_str(),
        }
    }

    pub(super) const fn without_workspace(outcome: Outcome) -> Self {
        Self {
            workspace: "",
            resolution: None,
            outcome,
            plan: None,
        }
    }
}

/// The first step's result.
pub enum Step<'a> {
    /// No lookup is needed.
    Done(Decision<'a>),
    /// Execute the policy's query with these parameters, then call [`Pending::finish`].
    Lookup(Vec<ParameterValue>, Pending<'a>),
}

impl<'a> Step<'a> {
    /// Returns the decision for a given lookup outcome. Only tests, benchmarks and fuzz targets call it.
    #[must_use]
    pub fn finish(self, outcome: &LookupOutcome) -> Decision<'a> {
        match self {
            Self::Done(decision) => decision,
            Self::Lookup(_, pending) => pending.finish(outcome),
        }
    }
}

/// A pod, its namespace and the containers to plan.
#[derive(Clone, Copy)]
pub struct PodTarget<'a> {
    /// The pod or pod template.
    pub pod: &'a Pod<'a>,
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The containers to plan.
    pub scope: Scope<'a>,
}

/// A decision that waits for its lookup.
pub struct Pending<'a> {
    policy: &'a Policy,
    webhook: Webhook,
    target: PodTarget<'a>,
    workspace: &'a str,
}

/// Begins the decision about a decoded review.
#[must_use]
pub fn begin<'a>(policy: &'a Policy, webhook: Webhook, review: &'a Decoded<'a>) -> Step<'a> {
    let target = match review {
        Decoded::Request(request) => pod_target(request),
        Decoded::Unreadable { refusal, .. } => Err(refusal.clone()),
    };
    match target {
        Ok(Some(target)) => begin_target(policy, webhook, target),
        Ok(None) => Step::Done(Decision::without_workspace(Outcome::NotApplicable)),
        Err(refusal) => Step::Done(Decision::without_workspace(Outcome::Refused(refusal))),
    }
}

fn pod_target<'a>(request: &'a Request<'a>) -> Result<Option<PodTarget<'a>>, Refusal> {
    let scope = match request.target() {
        AdmissionTarget::NotApplicable => return Ok(None),
        AdmissionTarget::PodCreation => Scope::Pod,
        AdmissionTarget::NewEphemeralContainers => {
            Scope::NewEphemeralContainers(request.old_object.as_ref())
        }
    };
    Ok(Some(PodTarget {
        pod: request.object.as_ref().ok_or(Refusal::NoObject)?,
        namespace: request.namespace(),
        scope,
    }))
}

/// Begins the decision about a pod that is not from a review, but from a manifest, a cluster or a label.
#[must_use]
pub fn begin_pod<'a>(policy: &'a Policy, target: PodTarget<'a>) -> Step<'a> {
    begin_target(policy, Webhook::Mutate, target)
}

fn begin_target<'a>(policy: &'a Policy, webhook: Webhook, target: PodTarget<'a>) -> Step<'a> {
    if target.scope.needs_no_mode(target.pod) {
        return Step::Done(Decision::without_workspace(Outcome::NotApplicable));
    }
    let pending = |workspace| Pending {
        policy,
        webhook,
        target,
        workspace,
    };
    match identify(policy, target.pod, target.namespace) {
        Ok(Identity::NotAWorkspace) => {
            Step::Done(Decision::without_workspace(Outcome::NotAWorkspace))
        }
        Ok(Identity::Fallback { workspace, reason }) => {
            Step::Done(pending(workspace).decide(Resolution::fallback(reason), &[]))
        }
        Ok(Identity::Lookup {
            workspace,
            parameters,
        }) => Step::Lookup(parameters, pending(workspace)),
        Err(refusal) => Step::Done(Decision::without_workspace(Outcome::Refused(refusal))),
    }
}

impl<'a> Pending<'a> {
    /// Returns the decision for the lookup's outcome.
    #[must_use]
    pub fn finish(self, outcome: &LookupOutcome) -> Decision<'a> {
        let resolution = Resolution::from_lookup(outcome);
        match (outcome, self.policy.lookup.on_error) {
            (LookupOutcome::Failed, OnError::Deny) => Decision {
                workspace: self.workspace,
                resolution: Some(resolution),
                outcome: Outcome::Refused(Refusal::LookupFailed),
                plan: None,
            },
            (LookupOutcome::Failed, OnError::PlatformManaged)
            | (LookupOutcome::Row(_) | LookupOutcome::NoRow, _) => {
                self.decide(resolution, outcome.columns())
            }
        }
    }

    fn decide(self, resolution: Resolution, columns: &[Option<String>]) -> Decision<'a> {
        let PodTarget {
            pod,
            namespace,
            scope,
        } = self.target;
        let workspace = Workspace {
            id: self.workspace,
            namespace,
            columns: Columns {
                names: &self.policy.columns,
                values: columns,
            },
        };
        let resolution = match scope {
            Scope::NewEphemeralContainers(_) if pod.was_created_as_platform_managed() => {
                resolution.of_platform_managed_pod()
            }
            Scope::NewEphemeralContainers(_) | Scope::Pod | Scope::Running => resolution,
        };
        let planned = plan(self.policy, workspace, resolution, pod, scope);
        let (outcome, plan) = match (self.webhook, planned) {
            (Webhook::Validate, planned) => (validate(planned, resolution.reason), None),
            (Webhook::Mutate, Err(refusal)) => (Outcome::Refused(refusal), None),
            (Webhook::Mutate, Ok(plan)) if plan.is_empty() => (Outcome::Unchanged, Some(plan)),
            (Webhook::Mutate, Ok(plan)) => (Outcome::Patched, Some(plan)),
        };
        Decision {
            workspace: self.workspace,
            resolution: Some(resolution),
            outcome,
            plan,
        }
    }
}

/// Rejects a pod that `Mutate` would refuse, or whose containers must still change. After a failed lookup the env may
/// match the workspace's real mode, so the failed lookup is the reason, even if the fallback's plan is a refusal.
fn validate(planned: Result<Plan<'_>, Refusal>, reason: Reason) -> Outcome {
    Outcome::Refused(match planned {
        Ok(plan) if plan.containers.is_empty() => return Outcome::Unchanged,
        _ if reason == Reason::LookupError => Refusal::LookupFailed,
        Ok(plan) => Refusal::NotSettled {
            findings: plan.findings(),
        },
        Err(refusal) => refusal,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::core::admission::decode;
    use crate::core::warning::WarningKind;

    const ID: &str = "88888888-8888-8888-8888-888888888888";
    const PROXY: &str = "proxy: {baseUrl: u, usageToken: {value: t}}";

    /// Formats a decision: workspace, reason, outcome or refusal code, number of planned containers.
    fn summary(decision: &Decision<'_>) -> String {
        let reason = decision
            .resolution
            .map_or("-", |resolution| resolution.reason.as_str());
        let outcome = match &decision.outcome {
            Outcome::NotApplicable => "not applicable",
            Outcome::NotAWorkspace => "not a workspace",
            Outcome::Refused(refusal) => refusal.code(),
            other => other.as_str(),
        };
        let plan = match &decision.plan {
            None => "no plan".to_owned(),
            Some(plan) => format!("{} containers", plan.containers.len()),
        };
        format!("{:?} {reason}: {outcome}, {plan}", decision.workspace)
    }

    fn create(pod: &Value) -> Value {
        json!({"uid": "u", "operation": "CREATE", "resource": {"resource": "pods"}, "object": pod})
    }

    fn review(request: &Value) -> String {
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request})
            .to_string()
    }

    fn decide(policy: &str, webhook: Webhook, request: &Value, lookup: &LookupOutcome) -> String {
        let body = review(request);
        let review = decode(body.as_bytes()).unwrap();
        let policy = Policy::parse(policy).unwrap();
        summary(&begin(&policy, webhook, &review).finish(lookup))
    }

    fn pod(labels: &Value, env: &Value) -> Value {
        let annotations = json!({
            "molecule.ai/llm-billing-mode": "byok",
            "molecule.ai/llm-billing-source": "workspace_override",
        });
        json!({
            "metadata": {"labels": labels, "annotations": annotations},
            "spec": {"containers": [{"name": "c", "env": env}]},
        })
    }

    #[test]
    fn decision_has_workspace_reason_outcome_and_plan() {
        use LookupOutcome::{Failed, NoRow};
        use Webhook::{Mutate, Validate};
        let byok = LookupOutcome::of_mode(Some("byok"));
        let label = |id: &str| json!({"molecule.ai/workspace-id": id});
        let mode = [
            "MOLECULE_LLM_BILLING_MODE",
            "MOLECULE_LLM_BILLING_MODE_RESOLVED",
        ]
        .map(|name| json!({"name": name, "value": "byok"}));
        let settled = create(&pod(&label(ID), &json!(mode)));
        let mut unannotated = settled.clone();
        unannotated["object"]["metadata"]["annotations"] = json!({});
        let bare = create(&pod(&label(ID), &json!([])));
        let invalid = create(&pod(&label("x"), &json!([])));
        let empty = create(&pod(&label(""), &json!([])));
        let unlabelled = create(&pod(&json!({}), &json!([])));
        let deny = &format!("{{lookup: {{onError: deny}}, {PROXY}}}");
        let none = json!({"uid": "u", "operation": "DELETE", "resource": {"resource": "pods"}});
        let unreadable = json!({"uid": "u", "object": 7});
        let id = |rest: &str| format!("{ID:?} {rest}");
        let table = [
            (PROXY, Mutate, &none, &byok, r#""" -: not applicable, no plan"#.to_owned()),
            (PROXY, Mutate, &unreadable, &byok, r#""" -: UNREADABLE_REQUEST, no plan"#.to_owned()),
            (PROXY, Mutate, &unlabelled, &byok, r#""" -: not a workspace, no plan"#.to_owned()),
            (
                "unlabelled: deny",
                Mutate,
                &unlabelled,
                &byok,
                r#""" -: MISSING_WORKSPACE_LABEL, no plan"#.to_owned(),
            ),
            (
                PROXY,
                Mutate,
                &empty,
                &byok,
                r#""" missing_workspace_id: patched, 1 containers"#.to_owned(),
            ),
            (
                PROXY,
                Mutate,
                &invalid,
                &byok,
                r#""x" invalid_workspace_id: patched, 1 containers"#.to_owned(),
            ),
            (PROXY, Mutate, &bare, &byok, id("override: patched, 1 containers")),
            (PROXY, Mutate, &settled, &byok, id("override: unchanged, 0 containers")),
            (PROXY, Mutate, &unannotated, &byok, id("override: patched, 0 containers")),
            (PROXY, Mutate, &bare, &NoRow, id("workspace_not_found: patched, 1 containers")),
            (PROXY, Mutate, &bare, &Failed, id("lookup_error: patched, 1 containers")),
            ("", Mutate, &bare, &Failed, id("lookup_error: MISSING_PLATFORM_PROXY, no plan")),
            (deny, Mutate, &bare, &Failed, id("lookup_error: LOOKUP_FAILED, no plan")),
            (deny, Mutate, &bare, &NoRow, id("workspace_not_found: patched, 1 containers")),
            (PROXY, Validate, &settled, &byok, id("override: unchanged, no plan")),
            (PROXY, Validate, &unannotated, &byok, id("override: unchanged, no plan")),
            (PROXY, Validate, &bare, &byok, id("override: ENV_NOT_SETTLED, no plan")),
            (PROXY, Validate, &bare, &Failed, id("lookup_error: LOOKUP_FAILED, no plan")),
            ("", Validate, &bare, &Failed, id("lookup_error: LOOKUP_FAILED, no plan")),
            (
                "",
                Validate,
                &bare,
                &NoRow,
                id("workspace_not_found: MISSING_PLATFORM_PROXY, no plan"),
            ),
        ];
        for (policy, webhook, request, lookup, expected) in table {
            assert_eq!(
                decide(policy, webhook, request, lookup),
                expected,
                "{webhook:?} {lookup:?} {policy} {request}"
            );
        }
    }

    #[test]
    fn container_added_to_a_platform_managed_pod_is_platform_managed() {
        let policy = Policy::parse(PROXY).unwrap();
        let labels = json!({"molecule.ai/workspace-id": ID});
        let annotated = |mode: &str| json!({"labels": labels, "annotations": {"molecule.ai/llm-billing-mode": mode}});
        let env = |mode: &str| json!([{"name": "c", "env": [{"name": "MOLECULE_LLM_BILLING_MODE", "value": mode}]}]);
        let debugger =
            json!([{"name": "debugger", "env": [{"name": "OPENAI_API_KEY", "value": "x"}]}]);
        let decide = |metadata: Value, containers: Value, operation: &str, webhook| {
            let pod = json!({"metadata": metadata, "spec": {"containers": containers, "ephemeralContainers": debugger}});
            let mut request = create(&pod);
            if operation == "UPDATE" {
                request["operation"] = "UPDATE".into();
                request["subResource"] = "ephemeralcontainers".into();
                request["oldObject"] = json!({});
            }
            let body = review(&request);
            let decoded = decode(body.as_bytes()).unwrap();
            let byok = LookupOutcome::of_mode(Some("byok"));
            let decision = begin(&policy, webhook, &decoded).finish(&byok);
            let warned = decision
                .warnings()
                .iter()
                .any(|one| one.kind == WarningKind::CreatedAs);
            let Labels {
                mode,
                reason,
                outcome,
                ..
            } = decision.labels();
            format!("{mode} {reason} {outcome} {warned}")
        };
        let (mutate, validate) = (Webhook::Mutate, Webhook::Validate);
        let table = [
            (
                annotated("platform_managed"),
                json!([]),
                "UPDATE",
                mutate,
                "platform_managed created_as patched true",
            ),
            (
                json!({"labels": labels}),
                env("platform_managed"),
                "UPDATE",
                mutate,
                "platform_managed created_as patched true",
            ),
            (
                annotated("byok"),
                env("platform_managed"),
                "UPDATE",
                mutate,
                "platform_managed created_as patched true",
            ),
            (
                annotated("platform_managed"),
                json!([]),
                "UPDATE",
                validate,
                "platform_managed created_as refused false",
            ),
            (annotated("disabled"), env("byok"), "UPDATE", mutate, "byok override patched false"),
            // At creation the author could have written both.
            (
                annotated("platform_managed"),
                env("platform_managed"),
                "CREATE",
                mutate,
                "byok override patched false",
            ),
        ];
        for (metadata, containers, operation, webhook, expected) in table {
            let message = format!("{metadata} {containers} {operation} {webhook:?}");
            assert_eq!(decide(metadata, containers, operation, webhook), expected, "{message}");
        }
    }

    #[test]
    fn labels_are_spelled_as_documented() {
        let targets = [
            AdmissionTarget::PodCreation,
            AdmissionTarget::NewEphemeralContainers,
            AdmissionTarget::NotApplicable,
        ];
        assert_eq!(
            targets.map(AdmissionTarget::as_str),
            ["create", "ephemeralcontainers", "other"]
        );
        assert_eq!(
            [Webhook::Mutate, Webhook::Validate].map(Webhook::as_str),
            ["mutate", "validate"]
        );
        let labels = |resolution, outcome| {
            let mut decision = Decision::without_workspace(outcome);
            decision.resolution = resolution;
            let Labels {
                mode,
                source,
                reason,
                outcome,
            } = decision.labels();
            [mode, source, reason, outcome]
        };
        let byok = Resolution::from_lookup(&LookupOutcome::of_mode(Some("byok")));
        let refused = Outcome::Refused(Refusal::NoObject);
        let fallback = Resolution::fallback(Reason::LookupError);
        let untouched = ["none", "none", "none", "untouched"];
        assert_eq!(labels(None, Outcome::NotApplicable), untouched);
        assert_eq!(labels(None, Outcome::NotAWorkspace), untouched);
        assert_eq!(
            labels(Some(byok), Outcome::Patched),
            ["byok", "workspace_override", "override", "patched"]
        );
        assert_eq!(
            labels(Some(byok), Outcome::Unchanged),
            ["byok", "workspace_override", "override", "unchanged"]
        );
        assert_eq!(
            labels(Some(fallback), refused),
            [
                "platform_managed",
                "constant_fallback",
                "lookup_error",
                "refused"
            ]
        );
    }

    #[test]
    fn pod_target_is_new_pods_and_new_ephemeral_containers() {
        let debugged = json!({"spec": {"ephemeralContainers": [{"name": "d"}]}});
        let (pod, none) = (json!({}), json!(null));
        let pods = json!({"group": "", "version": "v1", "resource": "pods"});
        let other = json!({"group": "apps", "resource": "pods"});
        let deployments = json!({"group": "", "resource": "deployments"});
        let ephemeral = json!("ephemeralcontainers");
        let (empty, binding, exec) = (json!(""), json!("binding"), json!("exec"));
        let table = [
            (&pods, &none, "CREATE", &pod, &none, "pod"),
            (&pods, &empty, "CREATE", &pod, &none, "pod"),
            (&pods, &none, "CREATE", &none, &none, "NO_OBJECT"),
            (&pods, &none, "UPDATE", &pod, &pod, "not applicable"),
            (&pods, &none, "DELETE", &none, &pod, "not applicable"),
            (&pods, &exec, "CONNECT", &none, &none, "not applicable"),
            (&pods, &binding, "CREATE", &pod, &none, "not applicable"),
            (&pods, &ephemeral, "UPDATE", &debugged, &pod, "ephemeral"),
            (&pods, &ephemeral, "UPDATE", &debugged, &none, "ephemeral"),
            (&pods, &ephemeral, "UPDATE", &debugged, &debugged, "not applicable"),
            (&pods, &ephemeral, "UPDATE", &none, &pod, "NO_OBJECT"),
            (&other, &none, "CREATE", &pod, &none, "not applicable"),
            (&deployments, &none, "CREATE", &pod, &none, "not applicable"),
            (&none, &none, "CREATE", &pod, &none, "not applicable"),
        ];
        let policy = Policy::parse(&format!("{{unlabelled: platform_managed, {PROXY}}}")).unwrap();
        for (resource, sub_resource, operation, object, old, expected) in table {
            let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
                "uid": "u", "resource": resource, "subResource": sub_resource, "operation": operation,
                "object": object, "oldObject": old,
            }});
            let body = review.to_string();
            let decoded = decode(body.as_bytes()).unwrap();
            let decision = begin(&policy, Webhook::Mutate, &decoded).finish(&LookupOutcome::NoRow);
            let target = match (&decision.outcome, &decision.plan) {
                (Outcome::NotApplicable, None) => "not applicable",
                (Outcome::Refused(refusal), None) => refusal.code(),
                // Only created pods get annotations; only ephemeral containers occur in this table.
                (Outcome::Patched, Some(plan)) if plan.containers.is_empty() => "pod",
                (Outcome::Patched, Some(plan)) if plan.annotations.is_empty() => "ephemeral",
                _ => "other",
            };
            assert_eq!(target, expected, "{review}");
        }
    }
}
