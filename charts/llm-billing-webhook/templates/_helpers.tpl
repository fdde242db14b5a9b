{{/* Names, labels and helpers that several templates share. Validation of values is in _validate.tpl. */}}

{{- define "llm-billing-webhook.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* The name of every object, or its prefix. A Service's name may have 63 characters. */}}
{{- define "llm-billing-webhook.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "llm-billing-webhook.name" . }}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* The component label keeps the pod of `helm test` out of the Service. Never change these: a Deployment's selector is
immutable. */}}
{{- define "llm-billing-webhook.selectorLabels" -}}
app.kubernetes.io/name: {{ include "llm-billing-webhook.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: webhook
{{- end }}

{{/* The labels of every object. commonLabels are added, and never override the chart's own. */}}
{{- define "llm-billing-webhook.labels" -}}
{{- $labels := include "llm-billing-webhook.selectorLabels" . | fromYaml }}
{{- $_ := set $labels "app.kubernetes.io/version" .Chart.AppVersion }}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .Release.Service }}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") }}
{{- merge $labels .Values.commonLabels | toYaml }}
{{- end }}

{{- define "llm-billing-webhook.convergeName" -}}
{{- printf "%s-converge" (include "llm-billing-webhook.fullname" . | trunc 54 | trimSuffix "-") }}
{{- end }}

{{- define "llm-billing-webhook.convergeSelectorLabels" -}}
{{- include "llm-billing-webhook.selectorLabels" . | replace "component: webhook" "component: converge" }}
{{- end }}

{{- define "llm-billing-webhook.convergeLabels" -}}
{{- include "llm-billing-webhook.labels" . | replace "component: webhook" "component: converge" }}
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

{{/* The policy file. With scope: namespace, pods without the label are platform_managed unless the values set
policy.unlabelled. */}}
{{- define "llm-billing-webhook.policy" -}}
{{- $policy := deepCopy .Values.policy }}
{{- if and (eq .Values.scope "namespace") (not (hasKey $policy "unlabelled")) }}
{{- $_ := set $policy "unlabelled" "platform_managed" }}
{{- end }}
{{- toYaml $policy }}
{{- end }}

{{/* Converts a duration such as 90d to seconds. */}}
{{- define "llm-billing-webhook.seconds" -}}
{{- $units := dict "s" 1 "m" 60 "h" 3600 "d" 86400 "w" 604800 }}
{{- mul (regexFind "^[0-9]+" . | int64) (get $units (regexFind "[a-z]$" .)) }}
{{- end }}

{{/* The namespaces in scope, as a label selector for converge. */}}
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

{{/* "true" if values select the namespaces in scope, else empty. */}}
{{- define "llm-billing-webhook.hasNamespaceSelector" -}}
{{- if or .Values.namespaceSelector.matchLabels .Values.namespaceSelector.matchExpressions }}true{{ end }}
{{- end }}

{{/* "true" if there is always more than one replica, else empty. */}}
{{- define "llm-billing-webhook.isReplicated" -}}
{{- if gt (int (ternary .Values.autoscaling.minReplicas .Values.replicas .Values.autoscaling.enabled)) 1 }}true{{ end }}
{{- end }}

{{/* The rest of a webhook configuration. Self-managed replicas write the webhooks once they are ready, with their CA: until
then, the webhooks would refuse every pod. Others have their CA from the start, or from cert-manager. */}}
{{- define "llm-billing-webhook.webhookConfiguration" -}}
{{- $mode := .context.Values.tls.mode -}}
metadata:
  name: {{ include "llm-billing-webhook.fullname" .context }}
  labels:
    {{- include "llm-billing-webhook.labels" .context | nindent 4 }}
  {{- if eq $mode "self-managed" }}
  annotations:
    molecule.ai/llm-billing-webhooks: {{ .webhooks | fromYamlArray | toJson | quote }}
  {{- else if eq $mode "cert-manager" }}
  annotations:
    cert-manager.io/inject-ca-from: {{ .context.Release.Namespace }}/{{ include "llm-billing-webhook.fullname" .context }}
  {{- end }}
{{- if ne $mode "self-managed" }}
webhooks:
  {{- .webhooks | nindent 2 }}
{{- end }}
{{- end }}

{{/* The requests that both webhooks cover. */}}
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
{{ include "llm-billing-webhook.podSelectors" . }}
{{- end }}

{{/* The pods in scope. The release's namespace is exempt: otherwise, with no replica running, none could start. */}}
{{- define "llm-billing-webhook.podSelectors" -}}
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
    - key: {{ include "llm-billing-webhook.workspaceLabel" . }}
      operator: Exists
{{- end }}
{{- end }}

{{- define "llm-billing-webhook.workspaceLabel" -}}
{{ default "molecule.ai/workspace-id" .Values.policy.workspaceLabel }}
{{- end }}

{{/* Selects the pods, or Services, that have metrics. */}}
{{- define "llm-billing-webhook.monitored" -}}
selector:
  matchLabels:
    {{- omit (include "llm-billing-webhook.selectorLabels" . | fromYaml) "app.kubernetes.io/component" | toYaml | nindent 4 }}
  matchExpressions:
    - {key: app.kubernetes.io/component, operator: In, values: [webhook, converge]}
{{- end }}

{{/* The policy and the database's URL and CA, in the containers of `serve` and `converge`. Directories, not subPath, which would
not receive a changed Secret. */}}
{{- define "llm-billing-webhook.volumeMounts" -}}
- name: policy
  mountPath: /etc/llm-billing/policy
  readOnly: true
{{- if not .Values.database.sqlite.enabled }}
- name: database
  mountPath: /etc/llm-billing/database
  readOnly: true
{{- end }}
{{- if .Values.database.caSecret.name }}
- name: database-ca
  mountPath: /etc/llm-billing/database-ca
  readOnly: true
{{- end }}
{{- end }}

{{- define "llm-billing-webhook.volumes" -}}
- name: policy
  configMap:
    name: {{ include "llm-billing-webhook.fullname" . }}-policy
{{- if not .Values.database.sqlite.enabled }}
- name: database
  secret:
    secretName: {{ .Values.database.existingSecret }}
    defaultMode: 0440
    items:
      - key: {{ .Values.database.key }}
        path: {{ .Values.database.key }}
{{- end }}
{{- with .Values.database.caSecret }}
{{- if .name }}
- name: database-ca
  secret:
    secretName: {{ .name }}
    defaultMode: 0440
    items:
      - key: {{ .key }}
        path: {{ .key }}
{{- end }}
{{- end }}
{{- end }}

{{/* The Service that the API server calls. Unless the values provide caBundle, the chart omits it: the replicas or
cert-manager write it, and an upgrade keeps it. */}}
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
