{{/* Names and labels, and what more than one template needs. Rules about values are in _validate.tpl. */}}

{{- define "llm-billing-webhook.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Every object's name, or how it begins. The Service's name may have 63 characters. */}}
{{- define "llm-billing-webhook.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "llm-billing-webhook.name" . }}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* The component keeps the pod of `helm test` out of the Service. These never change: a Deployment's selector
cannot. */}}
{{- define "llm-billing-webhook.selectorLabels" -}}
app.kubernetes.io/name: {{ include "llm-billing-webhook.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: webhook
{{- end }}

{{/* Every object's labels. commonLabels add to the chart's own, and never replace them. */}}
{{- define "llm-billing-webhook.labels" -}}
{{- $labels := include "llm-billing-webhook.selectorLabels" . | fromYaml }}
{{- $_ := set $labels "app.kubernetes.io/version" .Chart.AppVersion }}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .Release.Service }}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") }}
{{- merge $labels .Values.commonLabels | toYaml }}
{{- end }}

{{- define "llm-billing-webhook.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "llm-billing-webhook.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "llm-billing-webhook.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}
{{- end }}

{{- define "llm-billing-webhook.certificateSecret" -}}
{{- $fullname := include "llm-billing-webhook.fullname" . }}
{{- if eq .Values.tls.mode "self-managed" }}
{{- default (printf "%s-certificate" $fullname) .Values.tls.selfManaged.secretName }}
{{- else if eq .Values.tls.mode "cert-manager" }}
{{- printf "%s-tls" $fullname }}
{{- else }}
{{- .Values.tls.provided.secretName }}
{{- end }}
{{- end }}

{{/* The policy file. What stands in the values wins; where the webhook is asked about all pods of a namespace, those
without the label are platform_managed unless it says otherwise. */}}
{{- define "llm-billing-webhook.policy" -}}
{{- $policy := deepCopy .Values.policy }}
{{- if and (eq .Values.scope "namespace") (not (hasKey $policy "unlabelled")) }}
{{- $_ := set $policy "unlabelled" "platform_managed" }}
{{- end }}
{{- toYaml $policy }}
{{- end }}

{{/* A time such as 90d, in seconds. */}}
{{- define "llm-billing-webhook.seconds" -}}
{{- $units := dict "s" 1 "m" 60 "h" 3600 "d" 86400 "w" 604800 }}
{{- mul (regexFind "^[0-9]+" . | int64) (get $units (regexFind "[a-z]$" .)) }}
{{- end }}

{{/* The namespaces in which the webhook is asked, as a label selector; for audits where pods without the label count. */}}
{{- define "llm-billing-webhook.namespaceSelector" -}}
{{- $exempt := concat (list "kube-system" .Release.Namespace) .Values.exemptNamespaces | uniq }}
{{- $parts := list (printf "kubernetes.io/metadata.name notin (%s)" (join "," $exempt)) }}
{{- range $key, $value := .Values.namespaceSelector.matchLabels }}
{{- $parts = append $parts (printf "%s=%s" $key $value) }}
{{- end }}
{{- range .Values.namespaceSelector.matchExpressions }}
{{- if eq .operator "Exists" }}
{{- $parts = append $parts .key }}
{{- else if eq .operator "DoesNotExist" }}
{{- $parts = append $parts (printf "!%s" .key) }}
{{- else }}
{{- $parts = append $parts (printf "%s %s (%s)" .key (lower .operator) (join "," .values)) }}
{{- end }}
{{- end }}
{{- join "," $parts }}
{{- end }}

{{/* More than one replica, now or by autoscaling. */}}
{{- define "llm-billing-webhook.isReplicated" -}}
{{- if gt (int (ternary .Values.autoscaling.minReplicas .Values.replicas .Values.autoscaling.enabled)) 1 }}true{{ end }}
{{- end }}

{{/* Which requests both webhooks are asked about. Nobody is asked about the webhook's own pods: with none running,
none could start. */}}
{{- define "llm-billing-webhook.admissionMatch" -}}
admissionReviewVersions: [v1]
sideEffects: None
failurePolicy: {{ .Values.webhook.failurePolicy }}
matchPolicy: Equivalent
timeoutSeconds: {{ .Values.webhook.timeoutSeconds }}
rules:
  - apiGroups: [""]
    apiVersions: [v1]
    resources: [pods]
    operations: [CREATE]
    scope: Namespaced
  # kubectl debug
  - apiGroups: [""]
    apiVersions: [v1]
    resources: [pods/ephemeralcontainers]
    operations: [UPDATE]
    scope: Namespaced
namespaceSelector:
  {{- with .Values.namespaceSelector.matchLabels }}
  matchLabels:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  matchExpressions:
    - key: kubernetes.io/metadata.name
      operator: NotIn
      values:
        {{- concat (list "kube-system" .Release.Namespace) .Values.exemptNamespaces | uniq | toYaml | nindent 8 }}
    {{- with .Values.namespaceSelector.matchExpressions }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- if eq .Values.scope "labelled" }}
objectSelector:
  matchExpressions:
    - key: {{ default "molecule.ai/workspace-id" .Values.policy.workspaceLabel }}
      operator: Exists
{{- end }}
{{- end }}

{{/* Where the API server finds the webhook. Self-managed and by cert-manager, the CA is written by them. A field that
the chart does not have is left alone by whoever applies the chart again. */}}
{{- define "llm-billing-webhook.clientConfig" -}}
service:
  namespace: {{ .context.Release.Namespace }}
  name: {{ include "llm-billing-webhook.fullname" .context }}
  path: {{ .path }}
  port: {{ .context.Values.webhook.servicePort }}
{{- if and (eq .context.Values.tls.mode "provided") .context.Values.tls.provided.caBundle }}
caBundle: {{ .context.Values.tls.provided.caBundle | b64enc }}
{{- end }}
{{- end }}
