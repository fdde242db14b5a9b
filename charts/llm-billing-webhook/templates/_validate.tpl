{{/* Checks that values.schema.json cannot express: values that contradict each other. Each message ends with the remedy. */}}
{{- define "llm-billing-webhook.validate" -}}
{{- $sqlite := .Values.database.sqlite.enabled }}
{{- if and $sqlite .Values.database.existingSecret }}
{{- fail "database.existingSecret and database.sqlite.enabled are both set: unset one of them" }}
{{- end }}
{{- if not (or $sqlite .Values.database.existingSecret) }}
{{- fail "no database is given: set database.existingSecret to the name of a Secret with the database URL, or, for evaluation, database.sqlite.enabled=true and replicas=1" }}
{{- end }}
{{- if and $sqlite (or (ne (int .Values.replicas) 1) .Values.autoscaling.enabled) }}
{{- fail "database.sqlite is a file in one pod, which several replicas cannot share: set replicas=1 and autoscaling.enabled=false" }}
{{- end }}
{{- if and $sqlite .Values.converge.enabled }}
{{- fail "database.sqlite is a file in one pod, which converge cannot read: set converge.enabled=false" }}
{{- end }}
{{- if and .Values.autoscaling.enabled (lt (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.minReplicas)) }}
{{- fail "autoscaling.maxReplicas is less than autoscaling.minReplicas: raise it" }}
{{- end }}
{{- if and (eq .Values.tls.mode "self-managed") (lt (int64 (include "llm-billing-webhook.seconds" .Values.tls.selfManaged.caLifetime)) (mul 2 (int64 (include "llm-billing-webhook.seconds" .Values.tls.selfManaged.lifetime)))) }}
{{- fail "tls.selfManaged.caLifetime is less than twice tls.selfManaged.lifetime: raise it, since a CA must outlive the certificates that it signs" }}
{{- end }}
{{- if and (eq .Values.tls.mode "provided") (not .Values.tls.provided.secretName) }}
{{- fail "tls.mode is provided, but there is no certificate: set tls.provided.secretName to a Secret of type kubernetes.io/tls" }}
{{- end }}
{{- if and (eq .Values.scope "namespace") (not (or .Values.namespaceSelector.matchLabels .Values.namespaceSelector.matchExpressions)) }}
{{- fail "scope is namespace, but no namespace is selected: set namespaceSelector.matchLabels or namespaceSelector.matchExpressions" }}
{{- end }}
{{- if and .Values.guard.refuseLabelChanges (semverCompare "<1.30.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "guard.refuseLabelChanges needs Kubernetes 1.30 or later, and this is %s: set it to false" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- $unlabelled := default "ignore" .Values.policy.unlabelled }}
{{- if and (eq .Values.scope "labelled") (ne $unlabelled "ignore") }}
{{- fail (printf "policy.unlabelled is %s, but with scope: labelled the webhook does not cover pods without the label: set scope=namespace and namespaceSelector" $unlabelled) }}
{{- end }}
{{- end }}
